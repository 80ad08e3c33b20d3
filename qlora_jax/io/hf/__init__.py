"""Float checkpoints of Hugging Face models: fetched, loaded, merged with adapters."""
