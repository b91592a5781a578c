"""Run tests in an environment without Horovod. Runs in: the command line.

``.venv/bin/python scripts/without_horovod.py tests/without_horovod`` makes
``build/without-horovod``, a virtual environment of links to all that .venv has but Horovod, and
becomes pytest with the arguments.
"""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path

from environments import ROOT, become_pytest, run, site_packages, versions_in


def main() -> None:
    """Make the environment, which takes a second, and become pytest."""
    environment = ROOT / "build" / "without-horovod"
    run(sys.executable, "-m", "venv", "--without-pip", "--clear", str(environment))
    python = environment / "bin" / "python"
    own = site_packages(python)
    for package in Path(sysconfig.get_path("purelib")).iterdir():
        if package.name != "horovod" and not package.name.startswith("horovod-"):
            (own / package.name).symlink_to(package)
    become_pytest(python, versions_in(python, "pyspark", "torch", "tensorflow-cpu"), sys.argv[1:])


if __name__ == "__main__":
    main()
