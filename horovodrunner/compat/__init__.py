"""Holds the source of the top-level package ``sparkdl``. Runs in: no process under this name."""
