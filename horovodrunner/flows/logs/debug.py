"""The package's own log, which HOROVODRUNNER_LOG=debug turns on. Runs in: every process."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping

from horovodrunner.placement.environment import LOG

__all__ = ["turn_on_if_wanted"]


def turn_on_if_wanted(process: str, where: str, environ: Mapping[str, str] = os.environ) -> None:
    """Write the log of this process to its standard error, if a variable asks for it.

    Spark's Python workers serve one run after another: what an earlier one turned on is turned off.
    """
    logger = logging.getLogger("horovodrunner")
    if ours := [handler for handler in logger.handlers if handler.name == LOG]:
        logger.removeHandler(ours[0])
        logger.setLevel(logging.NOTSET)
        logger.propagate = True
    if environ.get(LOG, "").lower() != "debug":
        return
    handler = logging.StreamHandler()
    handler.name = LOG
    handler.setFormatter(
        logging.Formatter("%(asctime)s.%(msecs)03d %(name)s: %(message)s", "%H:%M:%S")
    )
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    logger.debug("the log of %s (process %d) is on %s", process, os.getpid(), where)
