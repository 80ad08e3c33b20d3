"""Safetensors files, without the safetensors package."""
