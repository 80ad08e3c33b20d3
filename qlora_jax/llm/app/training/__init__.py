"""What `qlora-jax train` uses to open, evaluate, log and resume a run."""
