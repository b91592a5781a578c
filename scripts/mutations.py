"""Break the package in many places and see that the tests notice. Runs in: the command line.

``.venv/bin/python scripts/mutations.py`` tries all of ``MUTATIONS``, each in a copy of the
checkout, and runs the tests that must fail then; names after it choose some. The exit code is 1 if
one survives. A text that is not there, or there twice, is an error: whoever changes such a line
changes the mutation.
"""
# ruff: noqa: T201

from __future__ import annotations

import os
import queue
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
COPIES = 2
LEFT_OUT = shutil.ignore_patterns(".*", "build", "_build", "__pycache__", "spark-warehouse")
SECONDS = 300
TESTS_FAILED = 1
"""pytest's exit code; others tell that it found no test, or could not run."""


class Mutation(NamedTuple):
    """A fault, and the tests that must notice it."""

    name: str
    file: str
    text: str
    becomes: str
    tests: str


MUTATIONS: tuple[Mutation, ...] = ()


def main() -> None:
    """Try the mutations that are named, or all of them."""
    chosen = [each for each in MUTATIONS if each.name in sys.argv[1:] or not sys.argv[1:]]
    if unknown := set(sys.argv[1:]) - {each.name for each in chosen}:
        sys.exit(f"error: there is no mutation {', '.join(sorted(unknown))}")
    copies: queue.Queue[Path] = queue.Queue()
    with tempfile.TemporaryDirectory(prefix="mutations-") as directory:
        for number in range(COPIES):
            copies.put(Path(shutil.copytree(ROOT, f"{directory}/{number}", ignore=LEFT_OUT)))

        def attempt(mutation: Mutation) -> bool:
            copy = copies.get()
            try:
                return is_noticed(mutation, copy)
            finally:
                copies.put(copy)

        with ThreadPoolExecutor(COPIES) as threads:
            noticed = list(threads.map(attempt, chosen))
    survivors = [each.name for each, was in zip(chosen, noticed, strict=True) if not was]
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} mutations were noticed")
    if survivors:
        sys.exit(f"error: these were not: {', '.join(survivors)}")


def is_noticed(mutation: Mutation, copy: Path) -> bool:
    """Apply a mutation in a copy of the checkout, run its tests, and put the text back."""
    path = copy / mutation.file
    source = path.read_text()
    path.write_text(mutated(mutation, source))
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    environ = {**os.environ, "PYTHONPATH": f"{copy}:{copy}/horovodrunner/compat"}
    try:
        done = subprocess.run(
            [*command, *mutation.tests.split()],
            cwd=copy,
            env=environ,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
    finally:
        path.write_text(source)
    if done.returncode not in (0, TESTS_FAILED):
        sys.exit(f"error: {mutation.name}: pytest says\n{done.stdout[-3000:]}{done.stderr[-1000:]}")
    noticed = done.returncode == TESTS_FAILED
    print(f"{'noticed ' if noticed else 'SURVIVED'} {mutation.name}", flush=True)
    return noticed


def mutated(mutation: Mutation, source: str) -> str:
    """Replace the text, which must be there once."""
    if (count := source.count(mutation.text)) != 1:
        raise ValueError(
            f"mutation {mutation.name}: {mutation.file} has its text {count} times instead of once"
        )
    return source.replace(mutation.text, mutation.becomes)


if __name__ == "__main__":
    main()
