"""Success or failure and its cause, back."""
