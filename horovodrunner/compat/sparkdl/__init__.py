"""The drop-in: Databricks' names for what horovodrunner has. Runs in: every process.

Installed as the top-level package ``sparkdl``.
"""

from horovodrunner import __version__
from horovodrunner.compat.absent import SPARKDL, advise, refuse_names
from horovodrunner.drop_in import warn_of_others

from .runner import HorovodRunner

__all__ = ["HorovodRunner", "__version__"]

warn_of_others(__file__)
advise(SPARKDL)
__getattr__ = refuse_names(__name__, SPARKDL)
