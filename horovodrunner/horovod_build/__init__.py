"""Builds Horovod for the frameworks that are installed. Runs in: the command line."""

from horovodrunner.horovod_build.install import build_horovod, check_horovod
from horovodrunner.horovod_build.recipe import Recipe, Status
from horovodrunner.horovod_build.verify import verify_allreduce

__all__ = ["Recipe", "Status", "build_horovod", "check_horovod", "verify_allreduce"]
