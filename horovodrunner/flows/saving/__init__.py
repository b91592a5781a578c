"""A checkpoint that somebody wants soon: all ranks save at one step."""
