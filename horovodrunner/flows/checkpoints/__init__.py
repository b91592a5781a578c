"""Checkpoints, back and out again."""
