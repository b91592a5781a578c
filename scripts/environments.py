"""What the scripts that test in other environments than .venv share. Runs in: the command line."""
# ruff: noqa: T201

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Packages that PYTHONPATH adds are not those of the environment.
ENVIRON = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def run(*command: str, environ: Mapping[str, str] = ENVIRON) -> None:
    """Run a command in the root of the checkout; show what it printed if it fails."""
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        sys.exit(f"{done.stdout}\nerror: {' '.join(command)}: exit code {done.returncode}")


def site_packages(python: Path) -> Path:
    """Return where an interpreter's packages are."""
    script = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return Path(subprocess.check_output([python, "-c", script], text=True).strip())


def versions_in(python: Path, *packages: str) -> dict[str, str]:
    """Return the versions of packages that an interpreter finds; what it lacks is left out."""
    script = (
        "import importlib.metadata as m, sys\n"
        "for name in sys.argv[1:]:\n"
        "    try: print(f'{name}={m.version(name)}')\n"
        "    except m.PackageNotFoundError: pass"
    )
    shown = subprocess.check_output([python, "-c", script, *packages], text=True, env=ENVIRON)
    return dict(each.split("=", 1) for each in shown.split())


def become_pytest(python: Path, versions: Mapping[str, str], arguments: Sequence[str]) -> None:
    """Print what is tested, and replace this process by pytest in the environment."""
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    environment = python.parent.parent.relative_to(ROOT)
    print(f"Testing with {named} ({environment})", flush=True)
    # an outer test session has named its own Python
    environ = {**os.environ, "TESTED_PYSPARK": versions["pyspark"], "PYSPARK_PYTHON": str(python)}
    os.execve(python, [str(python), "-m", "pytest", *arguments], environ)  # noqa: S606
