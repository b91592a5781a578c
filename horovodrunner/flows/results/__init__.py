"""What the ranks' mains returned, back."""
