"""What travels: one folder for each thing, one file for each process in it."""
