"""What rank 0's main returned, back."""
