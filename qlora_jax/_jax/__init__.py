"""General JAX utilities, which do not depend on quantization."""
