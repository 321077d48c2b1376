"""Tensors to tensors. Knows nothing of files, ranks or flags."""
