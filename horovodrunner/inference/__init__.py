"""Trained models applied to DataFrames. Runs in: the driver and Spark's Python workers."""
