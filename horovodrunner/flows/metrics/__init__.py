"""Numbers and progress, back."""
