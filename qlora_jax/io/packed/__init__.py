"""4-bit weights of other makers, as their checkpoints store them."""
