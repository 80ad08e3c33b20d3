"""Ways to compute the product, one module or package each."""
