"""Functions on parameter trees: quantize, init, merge, combine and others."""
