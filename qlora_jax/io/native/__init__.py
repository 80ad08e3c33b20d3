"""Our own format: a tree with packed kernels and adapters in one file."""
