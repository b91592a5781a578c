"""Notebooks as people have them, run as a notebook runs them."""
