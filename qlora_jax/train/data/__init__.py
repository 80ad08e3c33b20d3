"""Training data: rows, chat templates, tokens, batches."""
