"""Run tests with the newest packages that the registry has. Runs in: the command line.

``python3 scripts/newest.py tests/docs/test_readme.py`` makes ``build/newest`` or brings it up to
date, builds Horovod for it, and becomes pytest with the arguments that it does not know itself.
``--python 3.12`` takes another Python, and leaves torch out: ``build/python-3.12``.
"""
# ruff: noqa: T201

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys

from environments import ENVIRON, ROOT, become_pytest, run, versions_in

# setup.cfg has no upper bounds, and no constraint of this machine's pip is to add some.
UNBOUND = {**ENVIRON, "PIP_CONSTRAINT": os.devnull}
EXTRAS = "spark,connect,tensorflow,horovod-build,images,demo,test"
TORCH_EXTRAS = "torch,test-torch"
OF_INTEREST = (
    *("pyspark", "pandas", "pyarrow", "numpy", "torch", "tensorflow-cpu", "tensorflow", "keras"),
    *("tf-keras", "lightning", "mlflow-skinny", "horovod"),
)


def main() -> None:
    """Bring the environment up to date, build Horovod for it, and become pytest."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--python", metavar="VERSION", help="another Python; leaves torch out")
    chosen, arguments = parser.parse_known_args()
    name = f"python-{chosen.python}" if chosen.python else "newest"
    python = ROOT / "build" / name / "bin" / "python"
    if not python.exists():
        base = interpreter(chosen.python) if chosen.python else sys.executable
        run(base, "-m", "venv", "--clear", str(python.parent.parent))
    print(f"Bringing build/{name} up to date: seconds, or minutes if it is new", flush=True)
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    pip += ["--upgrade", "--upgrade-strategy", "eager"]
    extras = EXTRAS if chosen.python else f"{EXTRAS},{TORCH_EXTRAS}"
    project = ["--no-build-isolation", "--use-pep517", "--editable", f".[{extras}]"]
    run(*pip, "setuptools", "wheel", environ=UNBOUND)
    run(*pip, *project, environ=UNBOUND)
    # Its own requirements would put tensorflow beside tensorflow-cpu.
    run(*pip, "--no-deps", "tf-keras", environ=UNBOUND)
    build = [str(python), "-m", "horovodrunner", "build-horovod"]
    if subprocess.run(build, cwd=ROOT, env=UNBOUND, check=False).returncode != 0:
        sys.exit("error: Horovod could not be built (see above)")
    become_pytest(python, versions_in(python, *OF_INTEREST), arguments)


def interpreter(version: str) -> str:
    """Return the path of the Python of that version: the one on the PATH, or pyenv's."""
    if found := shutil.which(f"python{version}"):
        # pyenv's command of that name starts the version that the variable names.
        environ = {**ENVIRON, "PYENV_VERSION": version}
        ask = [found, "-c", "import sys; print(sys.executable)"]
        answer = subprocess.run(ask, env=environ, capture_output=True, text=True, check=False)
        if answer.returncode == 0:
            return answer.stdout.strip()
    sys.exit(f"error: python{version} was not found; install it, for instance with pyenv")


if __name__ == "__main__":
    main()
