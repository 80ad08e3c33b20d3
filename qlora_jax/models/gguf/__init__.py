"""GGUF files, of llama.cpp: the decoders and tokenizers that they hold."""
