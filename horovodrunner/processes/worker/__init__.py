"""The process that calls main(), one per rank. Runs in: the worker."""
