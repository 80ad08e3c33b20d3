"""QLoRA for JAX and Flax."""
