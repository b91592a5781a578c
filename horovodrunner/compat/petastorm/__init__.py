"""Petastorm's names, for what horovodrunner has. Runs in: every process.

Importable as ``petastorm``, too, where Petastorm itself is not installed; see docs/petastorm.md.
"""

from horovodrunner.compat.petastorm.reader import make_batch_reader, make_reader
from horovodrunner.compat.petastorm.transform import TransformSpec

__all__ = ["TransformSpec", "__version__", "make_batch_reader", "make_reader"]

__version__ = "0.13.1"
"""Of the Petastorm whose names these are: code that looks at the version finds what it expects."""
