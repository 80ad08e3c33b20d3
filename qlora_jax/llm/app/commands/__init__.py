"""The commands of `qlora-jax`, each in a file of its name."""
