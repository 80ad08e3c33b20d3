"""Fine-tuning and serving of language models, built on the library's public names."""
