"""JAX plumbing: nothing here is about quantization."""
