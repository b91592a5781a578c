"""What ranks do with checkpoints: PyTorch's states, whole and in parts, and what reads them."""
