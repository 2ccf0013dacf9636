"""Golden tensors on disk."""
