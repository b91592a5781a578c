"""Hosts, links and GPUs, tried before main is called."""
