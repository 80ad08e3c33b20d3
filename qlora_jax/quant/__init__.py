"""Quantization of single kernels: formats, blocks, scales, and the QTensor."""
