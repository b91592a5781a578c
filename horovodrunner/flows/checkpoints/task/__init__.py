"""What tasks do with checkpoints: keep parts, store them, fetch the latest."""
