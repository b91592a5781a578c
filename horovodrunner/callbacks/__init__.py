"""Callbacks that tell the driver how training goes: Keras, Lightning, PyTorch. Runs in: the worker.

One module per framework, and no framework is imported before a callback of it is made.
"""
