"""Metrics as event files for TensorBoard."""
