"""Make .venv: every dependency and a Horovod built for it. Runs in: the command line.

``python3 scripts/setup.py``, with the standard library alone; ``python3 scripts/setup.py demo``
makes what the demo needs of it. When nothing it depends on has changed since it last succeeded it
returns at once.
"""
# ruff: noqa: T201

import sys

# Old Pythons have to get as far as this message: no newer syntax in this file.
if sys.version_info < (3, 10):  # noqa: UP036
    sys.exit(
        f"error: {sys.executable} is Python {sys.version_info[0]}.{sys.version_info[1]}, "
        "and 3.10 or newer is needed: install one and name it: make PYTHON=python3.12 ..."
    )

import configparser
import fcntl
import hashlib
import importlib.util
import os
import runpy
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "set-up-for"
LOG = VENV / "set-up.log"
CXX_STANDARD = 20  # what the torch of constraints.txt needs
# Packages that PYTHONPATH adds are not those of .venv; and what a process imports is to be compiled
# once, not by each.
ENVIRON = {
    name: value
    for name, value in os.environ.items()
    if name not in ("PYTHONPATH", "PYTHONDONTWRITEBYTECODE")
}
# A change in any of these may ask for other packages or another Horovod.
INPUTS = (
    "setup.py",
    "setup.cfg",
    "constraints.txt",
    "scripts/setup.py",
    "horovodrunner/prerequisites.py",
    "horovodrunner/horovod_build/*.py",
    "horovodrunner/horovod_build/patches/*.patch",
)


class Scope(NamedTuple):
    """How much of .venv is made; the extras are those of setup.cfg."""

    stamp: Path
    minutes: int
    frameworks: str
    others: tuple[str, ...]


SCOPES = {
    "demo": Scope(VENV / "set-up-for-demo", 3, "torch", ("spark", "demo")),
    "all": Scope(
        STAMP,
        6,
        "torch,tensorflow",
        ("spark", "connect", "images", "demo", "test", "test-torch", "docs"),
    ),
}


def main() -> None:
    """Set up what is missing, one printed step after the other."""
    # A .venv that once had everything keeps it.
    scope = SCOPES["demo" if sys.argv[1:] == ["demo"] and not STAMP.exists() else "all"]
    VENV.mkdir(exist_ok=True)
    with (VENV / "set-up.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # "make demo" and "make test" may start together
        wanted = fingerprint()
        if scope.stamp.exists() and scope.stamp.read_text() == wanted and PYTHON.exists():
            return
        started = time.monotonic()
        require_prerequisites()
        print(f"Setting up .venv: about {scope.minutes} minutes from nothing on two cores.")
        set_up(scope)
        scope.stamp.write_text(wanted)
        print(f"Set up in {time.monotonic() - started:.0f} s.\n", flush=True)


def set_up(scope: Scope) -> None:
    """Install the frameworks, then build Horovod for them while the rest is downloaded."""
    if not PYTHON.exists():
        step("creating .venv", [sys.executable, "-m", "venv", str(VENV)])
    pip = [str(PYTHON), "-m", "pip", "--disable-pip-version-check", "install"]
    pip += ["--quiet", "--no-compile", "--constraint", "constraints.txt"]
    step("installing the build tools", [*pip, "setuptools", "wheel"])
    project = ["--no-build-isolation", "--use-pep517", "--editable"]
    step(
        f"installing {scope.frameworks.replace(',', ' and ')}",
        [*pip, *project, f".[{scope.frameworks},horovod-build]"],
    )
    print("- installing the rest meanwhile")
    rest = Step("installing the rest", [*pip, *requirements(scope.others)])
    try:
        print("- building Horovod: about 2 minutes for each framework", flush=True)
        build = [str(PYTHON), "-m", "horovodrunner", "build-horovod"]
        if subprocess.run(build, cwd=ROOT, env=ENVIRON, check=False).returncode != 0:
            sys.exit("error: the set-up stopped because Horovod could not be built (see above)")
    finally:
        rest.finish()
    if "tensorflow" in scope.frameworks:
        # Its own requirements would replace tensorflow-cpu by tensorflow.
        step("installing legacy Keras (tf-keras)", [*pip, "--no-deps", "tf-keras"])


def requirements(extras: tuple[str, ...]) -> list[str]:
    """Return what setup.cfg lists for some extras."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    lists = [config["options.extras_require"][extra] for extra in extras]
    return [line for text in lists for line in text.splitlines() if line]


def fingerprint() -> str:
    """Return a hash of everything the environment was made from, its place included."""
    digest = hashlib.sha256(str(ROOT).encode())
    for pattern in INPUTS:
        for path in sorted(ROOT.glob(pattern)):
            digest.update(f"\n{path.relative_to(ROOT)}\n".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def require_prerequisites() -> None:
    """Stop at once, with one line for each thing that is missing on this machine."""
    checks = runpy.run_path(str(ROOT / "horovodrunner" / "prerequisites.py"))
    problems = [checks["java_problem"](), *checks["build_problems"](CXX_STANDARD)]
    if importlib.util.find_spec("ensurepip") is None:
        problems.append(
            "Python's venv module is not complete (Debian/Ubuntu: apt install python3-venv)"
        )
    found = [problem for problem in problems if problem]
    if found:
        sys.exit("\n".join(f"error: {problem}" for problem in found))


class Step:
    """A command that runs, with its output in the log."""

    def __init__(self, title: str, command: list[str]) -> None:
        self._title = title
        with LOG.open("a") as log:
            log.write(f"\n$ {' '.join(command)}\n")
            log.flush()
            self._process = subprocess.Popen(
                command, cwd=ROOT, env=ENVIRON, stdout=log, stderr=subprocess.STDOUT
            )

    def finish(self) -> None:
        """Wait for its end; show the end of the log if it fails."""
        if code := self._process.wait():
            last = LOG.read_text(errors="replace").rstrip().splitlines()[-12:]
            sys.exit("\n".join(last) + f"\nerror: {self._title}: exit code {code}; log: {LOG}")


def step(title: str, command: list[str]) -> None:
    """Run a command to its end."""
    started = time.monotonic()
    Step(title, command).finish()
    print(f"- {title}: {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
