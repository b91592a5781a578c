"""Runs under a key, which are not done twice."""
