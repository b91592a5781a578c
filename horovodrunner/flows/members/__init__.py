"""What the tasks tell each other before they know their ranks."""
