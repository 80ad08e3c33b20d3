"""Float checkpoints of Hugging Face models: fetched, loaded, written with adapters."""
