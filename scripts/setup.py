"""Make .venv: every dependency and a Horovod built for it. Runs in: the command line.

``python3 scripts/setup.py``, with the standard library alone. When nothing it depends on has
changed since it last succeeded it returns at once.
"""
# ruff: noqa: T201

import sys

# Old Pythons have to get as far as this message: no newer syntax in this file.
if sys.version_info < (3, 10):  # noqa: UP036
    sys.exit(
        f"error: {sys.executable} is Python {sys.version_info[0]}.{sys.version_info[1]}, "
        "and 3.10 or newer is needed: install one and name it: make PYTHON=python3.12 ..."
    )

import fcntl
import hashlib
import importlib.util
import os
import runpy
import subprocess
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "set-up-for"
LOG = VENV / "set-up.log"
CXX_STANDARD = 20  # what the torch of constraints.txt needs
EXTRAS = "spark,connect,torch,tensorflow,horovod-build,images,demo,test,test-torch,docs"
# Packages that PYTHONPATH adds are not those of .venv.
ENVIRON = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
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


def main() -> None:
    """Set up what is missing, one printed step after the other."""
    VENV.mkdir(exist_ok=True)
    with (VENV / "set-up.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # "make demo" and "make test" may start together
        wanted = fingerprint()
        if STAMP.exists() and STAMP.read_text() == wanted and PYTHON.exists():
            return
        started = time.monotonic()
        require_prerequisites()
        print("Setting up .venv: about 7 minutes from nothing on two cores.", flush=True)
        if not PYTHON.exists():
            step("creating .venv, a few seconds", [sys.executable, "-m", "venv", str(VENV)])
        pip = [str(PYTHON), "-m", "pip", "--disable-pip-version-check", "install"]
        pip += ["--quiet", "--no-compile", "--constraint", "constraints.txt"]
        step("installing the build tools, a few seconds", [*pip, "setuptools", "wheel"])
        step(
            "downloading and installing torch, tensorflow, pyspark and the tools, "
            "1 to 4 minutes (about 700 MB)",
            [*pip, "--no-build-isolation", "--use-pep517", "--editable", f".[{EXTRAS}]"],
        )
        # Its own requirements would replace tensorflow-cpu by tensorflow.
        legacy_keras = [*pip, "--no-deps", "tf-keras"]
        step("installing legacy Keras (tf-keras), a few seconds", legacy_keras)
        # pip would do it too, on one core; and where Python is told to write no bytecode, every
        # process would compile torch anew.
        compileall = [str(PYTHON), "-m", "compileall", "-qq", "-j", "0", str(VENV / "lib")]
        step("compiling the installed Python files, about a minute", compileall, may_fail=True)
        print("- building Horovod for them, 3 to 5 minutes (seconds if built before)", flush=True)
        build = [str(PYTHON), "-m", "horovodrunner", "build-horovod"]
        if subprocess.run(build, cwd=ROOT, env=ENVIRON, check=False).returncode != 0:
            sys.exit("error: the set-up stopped because Horovod could not be built (see above)")
        STAMP.write_text(wanted)
        print(f"Set up in {time.monotonic() - started:.0f} s.\n", flush=True)


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


def step(title: str, command: list[str], *, may_fail: bool = False) -> None:
    """Run one step with its output in the log; show the end of it if the step fails."""
    print(f"- {title} ... ", end="", flush=True)
    started = time.monotonic()
    with LOG.open("a+") as log:
        log.write(f"\n$ {' '.join(command)}\n")
        log.flush()
        code = subprocess.run(
            command, cwd=ROOT, env=ENVIRON, stdout=log, stderr=subprocess.STDOUT, check=False
        ).returncode
    if code != 0 and not may_fail:
        print("failed")
        last = LOG.read_text(errors="replace").rstrip().splitlines()[-12:]
        sys.exit("\n".join(last) + f"\nerror: {title}: exit code {code}; full log: {LOG}")
    print(f"{time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
