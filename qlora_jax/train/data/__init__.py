"""Data to train on: rows, chat templates, tokens, batches."""
