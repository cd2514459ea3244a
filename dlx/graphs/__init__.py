"""DEVICE: what becomes a CUDA graph. While serving, of this folder's Python only `replay()` runs."""
