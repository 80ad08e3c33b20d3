"""Products of arrays and packed kernels."""
