"""DEVICE: what becomes a CUDA graph. While serving, of its Python only `replay()` and what fills its inputs run."""
