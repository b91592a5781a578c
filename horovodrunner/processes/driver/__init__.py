"""Validate, pickle, launch, show logs, raise or return. Runs in: the driver."""
