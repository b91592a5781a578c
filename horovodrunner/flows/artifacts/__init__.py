"""Files, back."""
