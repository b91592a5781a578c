"""Output and log_to_driver, back."""
