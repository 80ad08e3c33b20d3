"""Decoders and tokenizers in llama.cpp's GGUF files."""
