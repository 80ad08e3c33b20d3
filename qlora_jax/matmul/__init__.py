"""x @ QTensor, and nothing else."""
