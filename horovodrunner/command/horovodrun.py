"""The options of Horovod's own command, as far as a command line has to be split and explained.

Horovod's parser reads them (placement/rendezvous.py); it is imported only when a run is started.
Runs in: the command line.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["HOROVODRUN", "Option"]


class Option(NamedTuple):
    """One option, by all its names; `values` is what it takes, in the words of a help text."""

    names: tuple[str, ...]
    values: tuple[str, ...] = ()
    help: str = ""
    """What it does; "" for one that has no meaning here, which Horovod's parser then refuses."""


HOROVODRUN = (
    Option(("--config-file",), ("FILE",), "YAML file with Horovod's options"),
    Option(("--fusion-threshold-mb",), ("N",), "megabytes of tensors that are reduced together"),
    Option(("--cycle-time-ms",), ("MS",), "time between two rounds of collectives"),
    Option(("--cache-capacity",), ("N",), "tensor names that are cached"),
    Option(("--hierarchical-allreduce",), (), "reduce within hosts first"),
    Option(("--no-hierarchical-allreduce",), (), "never do so, also with --autotune"),
    Option(("--hierarchical-allgather",), (), "gather within hosts first"),
    Option(("--no-hierarchical-allgather",), (), "never do so, also with --autotune"),
    Option(("--torus-allreduce",), (), "reduce in two dimensions, with NCCL"),
    Option(("--no-torus-allreduce",), (), "never do so, also with --autotune"),
    Option(("--autotune",), (), "try out the best values while training goes on"),
    Option(("--no-autotune",), (), "whatever the environment says"),
    Option(("--autotune-log-file",), ("FILE",), "what was tried, and how fast it was"),
    Option(("--autotune-warmup-samples",), ("N",), "samples that are thrown away at first"),
    Option(("--autotune-steps-per-sample",), ("N",), "steps of one sample"),
    Option(("--autotune-bayes-opt-max-samples",), ("N",), "how many samples are tried"),
    Option(("--autotune-gaussian-process-noise",), ("X",), "between 0 and 1"),
    Option(("--timeline-filename",), ("FILE",), "Horovod's timeline, which is written here"),
    Option(("--timeline-mark-cycles",), (), "mark rounds in the timeline"),
    Option(("--no-timeline-mark-cycles",)),
    Option(("--no-stall-check",), (), "no warnings of Horovod's about ranks that wait"),
    Option(("--stall-check",)),
    Option(("--stall-check-warning-time-seconds",), ("S",), "when Horovod warns about them"),
    Option(("--stall-check-shutdown-time-seconds",), ("S",), "when Horovod ends the run"),
    Option(("--num-nccl-streams",), ("N",), "streams of NCCL"),
    Option(("--thread-affinity",), ("N",), "core of Horovod's thread"),
    Option(("--gloo-timeout-seconds",), ("S",), "how long an operation of Gloo may take"),
    Option(("--log-level",), ("LEVEL",), "what Horovod itself logs: TRACE to FATAL"),
    Option(("--log-with-timestamp",)),
    Option(("--log-without-timestamp",), (), "no time in Horovod's log"),
    Option(("--log-hide-timestamp",)),
    Option(("--no-log-hide-timestamp",)),
    Option(("--gloo",), (), "as always here"),
    Option(("--tcp",)),
    Option(("-v", "--version")),
    Option(("-cb", "--check-build")),
    Option(("--disable-cache",)),
    Option(("--network-interfaces",), ("NAMES",)),
    Option(("--network-interface",), ("NAME",)),
    Option(("-p", "--ssh-port"), ("PORT",)),
    Option(("-i", "--ssh-identity-file"), ("FILE",)),
    Option(("--min-np", "--min-num-proc"), ("N",)),
    Option(("--max-np", "--max-num-proc"), ("N",)),
    Option(("--slots-per-host",), ("N",)),
    Option(("--elastic-timeout",), ("S",)),
    Option(("--reset-limit",), ("N",)),
    Option(("--blacklist-cooldown-range",), ("MIN", "MAX")),
    Option(("--mpi-threads-disable",)),
    Option(("--no-mpi-threads-disable",)),
    Option(("--mpi-args",), ("ARGS",)),
    Option(("--binding-args",), ("ARGS",)),
    Option(("-prefix-timestamp", "--prefix-output-with-timestamp")),
    Option(("-H", "--hosts"), ("HOSTS",)),
    Option(("-hostfile", "--hostfile"), ("FILE",)),
    Option(("--host-discovery-script",), ("FILE",)),
    Option(("--mpi",)),
    Option(("--jsrun",)),
)
"""Those of Horovod 0.28, but for what command/line.py has itself."""
