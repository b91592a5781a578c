"""The command line: ``python -m horovodrunner``. Runs in: the command line."""

from __future__ import annotations

import argparse
import importlib.metadata
import sys

from horovodrunner.errors import HorovodRunnerError


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return the exit code: 0, or 1 for a problem that is printed."""
    parser = _parser()
    chosen = parser.parse_args(arguments)
    if chosen.command is None:
        parser.print_help()
        return 0
    # Each command imports what it needs, so that help and --version are immediate.
    try:
        if chosen.command == "doctor":
            from horovodrunner.doctor import run_doctor

            return run_doctor()
        return _build_horovod(check=chosen.check, force=chosen.force)
    except HorovodRunnerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; nothing was installed", file=sys.stderr)
        return 130


def _build_horovod(*, check: bool, force: bool) -> int:
    from horovodrunner.horovod_build import build_horovod, check_horovod

    if not check:
        build_horovod(force=force, say=lambda line: print(line, flush=True))
        return 0
    status = check_horovod()
    print(status.text)
    if not status.fits:
        print("build it with: python -m horovodrunner build-horovod")
    return 0 if status.fits else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m horovodrunner",
        description="HorovodRunner for every Apache Spark: set-up and diagnosis.",
    )
    try:
        version = importlib.metadata.version("horovodrunner")
    except importlib.metadata.PackageNotFoundError:  # run from a checkout, on PYTHONPATH
        version = "(not installed)"
    parser.add_argument("--version", action="version", version=f"horovodrunner {version}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    commands.add_parser(
        "doctor",
        help="look at Python, Java, Spark, Horovod, frameworks, GPUs and network, "
        "and say what to do about problems",
    )
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


if __name__ == "__main__":
    sys.exit(main())
