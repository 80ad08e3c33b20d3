"""LoRA adapters: config, products, and calls of adapted modules."""
