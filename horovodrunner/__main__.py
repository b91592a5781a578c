"""The command line: ``python -m horovodrunner``. Runs in: the command line."""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run by its path, as spark-submit does: its directory is no place for imports
    _own = Path(__file__).resolve().parent
    sys.path[:] = [each for each in sys.path if Path(each or ".").resolve() != _own]
    if str(_own.parent) not in sys.path:
        sys.path.append(str(_own.parent))

import argparse
import os
from typing import Any, TextIO

from horovodrunner import __version__
from horovodrunner.errors import HorovodRunnerError


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return the exit code: 0, or 1 for a problem that is printed.

    A reader that goes away (``doctor | head``) changes nothing but what is shown.
    """
    words = sys.argv[1:] if arguments is None else arguments
    if words[:1] == ["run"]:
        from horovodrunner.command.run import run_command

        return run_command(words[1:], _say)
    parser = _parser()
    chosen = parser.parse_args(words)
    if chosen.command is None:
        parser.print_help()
        return 0
    # Each command imports what it needs, so that help and --version are immediate.
    try:
        return _run_command(chosen)
    except HorovodRunnerError as error:
        _say(f"error: {error}", sys.stderr)
        return 1
    except KeyboardInterrupt:
        _say("interrupted; nothing was changed", sys.stderr)
        return 130


def _run_command(chosen: argparse.Namespace) -> int:
    if chosen.command == "doctor":
        from horovodrunner.doctor import run_doctor

        return run_doctor(_say)
    if chosen.command == "report":
        return _report(Path(chosen.directory))
    if chosen.command == "pack":
        return _pack(chosen.output, chosen.python_prefix)
    return _build_horovod(check=chosen.check, force=chosen.force)


def _report(directory: Path) -> int:
    from horovodrunner.flows.rundir.report import write_report

    try:
        _say(str(write_report(directory)))
    except OSError as error:
        _say(f"error: the report cannot be written: {error}", sys.stderr)
        return 1
    return 0


def _pack(output: str | None, python_prefix: str | None) -> int:
    from horovodrunner.command.signals import EndingSignals
    from horovodrunner.packing import pack

    signals = EndingSignals()
    signals.install()  # what was half written goes
    try:
        pack(output, python_prefix, _say)
    except KeyboardInterrupt:
        _say("interrupted; nothing was changed", sys.stderr)
        return signals.exit_code
    return 0


def _build_horovod(*, check: bool, force: bool) -> int:
    from horovodrunner.horovod_build import build_horovod, check_horovod

    if not check:
        build_horovod(force=force, say=_say)
        return 0
    status = check_horovod()
    _say(status.text)
    if not status.fits:
        _say("build it with: python -m horovodrunner build-horovod")
    return 0 if status.fits else 1


def _say(text: str, stream: TextIO | None = None) -> None:
    """Print a text; where nobody reads any more, it and all later ones are lost."""
    stream = stream or sys.stdout
    try:
        print(text, file=stream, flush=True)
    except UnicodeEncodeError:  # a path, say, in a terminal that knows ASCII alone
        _say(text.encode("ascii", "backslashreplace").decode(), stream)
    except BrokenPipeError:
        # The interpreter flushes once more when it ends, and would complain.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


class _Parser(argparse.ArgumentParser):
    """Prints its help and its errors as everything else is printed."""

    def _print_message(self, message: str, file: Any = None) -> None:
        if message:
            _say(message.rstrip("\n"), file)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m horovodrunner",
        description="HorovodRunner for every Apache Spark: runs, set-up and diagnosis.",
    )
    parser.add_argument("--version", action="version", version=f"horovodrunner {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    commands.add_parser(
        "run",
        add_help=False,
        help="run a script on every rank, as horovodrun does: run -np 4 -- train.py --epochs 3",
    )
    commands.add_parser(
        "doctor",
        help="look at Python, Java, Spark, Horovod, frameworks, GPUs and network, "
        "and say what to do about problems",
    )
    report = commands.add_parser(
        "report",
        help="write the report of a run anew, from the directory that run_dir= keeps",
    )
    report.add_argument("directory", metavar="DIR", help="the directory of one run")
    _add_pack(commands)
    build = commands.add_parser(
        "build-horovod",
        help="build and install Horovod for the installed torch and tensorflow",
    )
    either = build.add_mutually_exclusive_group()
    either.add_argument(
        "--check",
        action="store_true",
        help="only report; exit code 1 if Horovod is missing or built for other versions",
    )
    either.add_argument(
        "--force", action="store_true", help="build anew, whatever is installed or cached"
    )
    return parser


def _add_pack(commands: Any) -> None:
    pack = commands.add_parser(
        "pack",
        help="pack the environment in use into an archive that Spark brings to its executors",
    )
    pack.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        help="the archive, *.tar.gz (default: here, named by its content)",
    )
    pack.add_argument(
        "--python-prefix",
        metavar="DIR",
        help="leave out the interpreter of a virtual environment: every executor has the same "
        "Python at DIR/bin",
    )


if __name__ == "__main__":
    sys.exit(main())
