"""Bytes on disk to a `Batch` on the device. Knows nothing of models."""
