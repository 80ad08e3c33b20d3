"""Fetches and loads Hugging Face checkpoints, and writes merged models."""
