"""Our own format: packed kernels and adapters in one file."""
