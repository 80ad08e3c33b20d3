"""The fused TPU kernel: products with packed codes that are decoded in VMEM."""
