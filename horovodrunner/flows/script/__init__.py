"""A script and the code beside it, out."""
