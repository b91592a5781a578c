"""Hosts and GPUs to slots to environment variables."""
