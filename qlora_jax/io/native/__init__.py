"""The format of this library: packed kernels and adapters in one file."""
