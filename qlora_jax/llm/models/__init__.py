"""Models, checkpoints and tokenizers, built on the public API."""
