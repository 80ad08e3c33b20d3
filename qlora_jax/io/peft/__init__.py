"""Reads and writes PEFT adapters (JSON and safetensors) without importing PEFT."""
