"""The command `qlora-jax`."""
