"""Run tests with another PySpark than that of .venv. Runs in: the command line.

``.venv/bin/python scripts/other_spark.py 3.5 tests/spark`` takes the newest 3.5; the arguments
after it are pytest's. That PySpark, and what it needs in other versions than .venv has them, go
into ``build/spark-3.5``, a virtual environment that sees all other packages of .venv. To look for
a newer release, remove the folder.
"""
# ruff: noqa: T201

from __future__ import annotations

import hashlib
import sys
import sysconfig
from pathlib import Path

from environments import ROOT, become_pytest, run, site_packages, versions_in

SET_UP = ROOT / ".venv" / "set-up-for"
OF_INTEREST = ("py4j", "pandas", "pyarrow", "numpy")
# PySpark 3.5 asks for a NumPy before 2, which newer ones of these do not work with; these are the
# oldest that setup.cfg allows.
BESIDE_SPARK_3 = ("pandas==2.2.*", "pyarrow==15.*")
BESIDE_SPARK_4 = ("pandas<3",)  # PySpark 4.2 and 4.3 warn of newer ones
WARNING_OF_SPARK_3 = "ignore:distutils Version classes are deprecated:DeprecationWarning"


def main() -> None:
    """Set the environment up if it is not yet, say what is in it, and become pytest."""
    release, *arguments = sys.argv[1:]
    environment = ROOT / "build" / f"spark-{release}"
    python = environment / "bin" / "python"
    stamp = environment / "set-up-for"
    wanted = fingerprint()
    if not (stamp.exists() and stamp.read_text() == wanted):
        set_up(environment, python, release)
        stamp.write_text(wanted)
    versions = versions_in(python, "pyspark", *OF_INTEREST)
    pyspark = versions["pyspark"]
    if not f"{pyspark}.".startswith(f"{release}."):
        sys.exit(f"error: {environment} finds pyspark {pyspark}: remove it and try again")
    if is_spark_3(release):
        arguments += ["-W", WARNING_OF_SPARK_3]
    become_pytest(python, versions, arguments)


def fingerprint() -> str:
    """Return a hash of what the environment was made from."""
    digest = hashlib.sha256(SET_UP.read_bytes())
    digest.update(Path(__file__).read_bytes())
    return digest.hexdigest()


def is_spark_3(release: str) -> bool:
    """Return whether that is one of Spark 3, of which only 3.5 is supported."""
    return release.split(".", 1)[0] == "3"


def set_up(environment: Path, python: Path, release: str) -> None:
    """Make the environment, and install what .venv lacks into it."""
    print(f"Setting up {environment.relative_to(ROOT)}: 1 to 3 minutes, about 400 MB.", flush=True)
    run(sys.executable, "-m", "venv", "--without-pip", "--clear", str(environment))
    own, others = site_packages(python), sysconfig.get_path("purelib")
    # Added as a site, so that .venv's own .pth files count, and after the environment's packages.
    (own / "packages-of-venv.pth").write_text(f"import site; site.addsitedir({others!r})\n")
    beside = BESIDE_SPARK_3 if is_spark_3(release) else BESIDE_SPARK_4
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    # Without --upgrade the one of .venv would do as the newest 4.
    run(*pip, "--upgrade", f"pyspark[connect]=={release}.*", *beside)


if __name__ == "__main__":
    main()
