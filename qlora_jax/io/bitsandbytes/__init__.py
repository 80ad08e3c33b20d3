"""4-bit checkpoints of bitsandbytes, without torch."""
