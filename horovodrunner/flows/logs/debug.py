"""The package's own log, which HOROVODRUNNER_LOG=debug turns on. Runs in: every process."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping

from horovodrunner.placement.environment import LOG

__all__ = ["turn_on_if_wanted"]


def turn_on_if_wanted(process: str, where: str, environ: Mapping[str, str] = os.environ) -> None:
    """Write the log of this process to its standard error, if a variable asks for it."""
    wanted = environ.get(LOG, "")
    logger = logging.getLogger("horovodrunner")
    if wanted.lower() != "debug" or logger.level == logging.DEBUG:
        return
    handler = logging.StreamHandler()
    handler.setFormatter(
        logging.Formatter("%(asctime)s.%(msecs)03d %(name)s: %(message)s", "%H:%M:%S")
    )
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    logger.debug("the log of %s (process %d) is on %s", process, os.getpid(), where)
