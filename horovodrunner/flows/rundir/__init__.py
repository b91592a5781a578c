"""The record of a run: a directory that grows while it goes on."""
