"""What a run prints before it starts. Runs in: the driver."""

from __future__ import annotations

import os

from horovodrunner.flows.logs.driver import Console
from horovodrunner.formatting import format_bytes
from horovodrunner.options import Options
from horovodrunner.placement.environment import TF_CONFIG

__all__ = ["announce"]


def announce(console: Console, options: Options, what: str, call_bytes: int) -> None:
    """Print how many ranks run where, and what is shown of their output."""
    np = options.np
    ranks = "all slots" if np == 0 else f"{abs(np)} rank{'s' * (abs(np) > 1)}"
    console.note(f"{ranks} {_mode(console, options)}", routine=True)
    if TF_CONFIG in os.environ:
        console.note(
            "the driver's TF_CONFIG describes one process and is not given to the ranks; "
            + ("each gets its own" if options.tf_config else "tf_config=True gives each its own")
        )
    console.note(f"{what} {format_bytes(call_bytes)}", routine=True)


def _mode(console: Console, options: Options) -> str:
    if options.np < 0:
        return "on this machine, for debugging; all output of the ranks is shown here"
    if options.shows_output:
        return (
            "on Spark; all output of the ranks is shown here "
            '(driver_log_verbosity="log_callback_only" shows only log_to_driver messages)'
        )
    from horovodrunner.spark import session

    if not session.has_session():
        console.note("there is no SparkSession yet: creating one", routine=True)
        console.show(0)
    if session.shares_terminal(session.find_session()):
        return (
            "on Spark; log_to_driver messages are shown here, and so is all output of the "
            "ranks, on standard error: with a local master that is the executor's log "
            '(driver_log_verbosity="all" shows it on standard output)'
        )
    return (
        "on Spark; only log_to_driver messages are shown here "
        '(driver_log_verbosity="all" shows all output of the ranks)'
    )
