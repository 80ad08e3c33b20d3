"""Modules of one Flax API inside the other, with packed kernels."""
