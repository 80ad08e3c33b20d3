"""Models written with the public names only."""
