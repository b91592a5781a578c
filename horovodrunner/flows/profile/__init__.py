"""Where the time of each rank's main goes, back."""
