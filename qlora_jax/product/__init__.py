"""Matrix products of arrays with packed kernels (quantized weight matrices)."""
