"""Back ends of the product."""
