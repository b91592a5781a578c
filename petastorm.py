"""What ``import petastorm`` gives where Petastorm itself is not installed. Runs in: every process.

Python prefers a package to a module of the same name, so a Petastorm in the same directory comes
first; one that is further on in the path is imported in place of this module.
"""

import importlib
import sys

from horovodrunner.drop_in import import_package_instead

if not import_package_instead(__name__):
    from horovodrunner.compat.absent import PETASTORM, advise, refuse_names
    from horovodrunner.compat.petastorm import *  # noqa: F403

    __path__: list[str] = []
    for _name in ("pytorch", "reader", "spark", "tf_utils", "transform"):
        _module = importlib.import_module(f"horovodrunner.compat.petastorm.{_name}")
        # the very same module, so that there is one class of each name
        globals()[_name] = sys.modules[f"{__name__}.{_name}"] = _module
    __getattr__ = refuse_names(__name__, PETASTORM)
    advise(PETASTORM)
