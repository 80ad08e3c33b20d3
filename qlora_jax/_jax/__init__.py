"""JAX plumbing that knows nothing of quantization."""
