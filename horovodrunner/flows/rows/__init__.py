"""Rows of DataFrames, out."""
