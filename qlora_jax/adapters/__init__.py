"""LoRA adapters: config, initializers, products, and calls of adapted modules."""
