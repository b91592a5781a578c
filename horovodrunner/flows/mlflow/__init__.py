"""Runs in MLflow: metrics, parameters, tags, system metrics and the outcome."""
