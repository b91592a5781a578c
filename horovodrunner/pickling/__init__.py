"""Pickles with their buffers beside them, and what to say when it fails."""
