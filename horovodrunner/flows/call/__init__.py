"""main and its arguments, out."""
