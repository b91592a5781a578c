"""For TensorFlow. Runs in: the worker."""
