"""Horovod's source archive and the patches to it. Runs in: the command line.

Each file in ``patches`` begins with its reason. They are right for every Python and framework
version, and are always applied all together.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from horovodrunner.errors import HorovodBuildError

HOROVOD_VERSION = "0.28.1"
SDIST_SHA256 = "92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0"
PATCHES = tuple(sorted(Path(__file__).with_name("patches").glob("*.patch")))
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")

RECORD_NAME = "horovodrunner_build.json"
"""File in the wheel that says what it was built for."""

CXX_VARIABLES = {"torch": "HOROVODRUNNER_CXX_TORCH", "tensorflow": "HOROVODRUNNER_CXX_TENSORFLOW"}
"""Variable that tells the build the C++ standard of each framework's headers."""

WITHOUT_CUDA = "HOROVODRUNNER_WITHOUT_CUDA"
"""Variable that is set when the build is not to look for CUDA."""

Say = Callable[[str], None]
"""Called with one line for each step."""


def fingerprint(patches: Sequence[Path] = PATCHES) -> str:
    """Return a short hash of what the patches change, whatever their reasons say."""
    digest = hashlib.sha256()
    for patch in patches:
        _, begin, changes = patch.read_bytes().partition(b"--- a/")
        digest.update(begin + changes)
    return digest.hexdigest()[:16]


def patched_sources(work: Path, say: Say) -> Path:
    """Fetch, unpack and patch Horovod below the empty folder `work`, and return its folder."""
    say(f"fetching Horovod {HOROVOD_VERSION}'s source archive (3.5 MB)")
    # pip checks the hash; it takes one from a requirements file only, not on its command line.
    requirements = work / "requirements.txt"
    requirements.write_text(f"horovod=={HOROVOD_VERSION} --hash=sha256:{SDIST_SHA256}\n")
    command = [*PIP, "download", "--no-deps", "--no-binary", ":all:", "--no-build-isolation"]
    command += ["--require-hashes", "--dest", str(work), "--requirement", str(requirements)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = [line for line in done.stderr.strip().splitlines() if "notice" not in line]
        raise HorovodBuildError(
            f"pip could not download Horovod {HOROVOD_VERSION}'s source archive "
            f"(exit code {done.returncode}):\n  " + "\n  ".join(lines[-4:])
        )
    source = work / f"horovod-{HOROVOD_VERSION}"
    shutil.unpack_archive(f"{source}.tar.gz", work)
    apply_patches(source)
    return source


def apply_patches(source: Path, patches: Sequence[Path] = PATCHES) -> None:
    """Apply patches strictly, so that sources they were not written for are noticed."""
    command = (
        ["git", "apply"]
        if shutil.which("git")
        else ["patch", "--strip=1", "--fuzz=0", "--force", "--no-backup-if-mismatch", "--input"]
    )
    # Inside a repository git would leave out what is not in it.
    environ = {**os.environ, "GIT_CEILING_DIRECTORIES": str(source.resolve().parent)}
    for patch in patches:
        done = subprocess.run(
            [*command, str(patch)],
            cwd=source,
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise HorovodBuildError(
                f"{patch.name} cannot be applied: it was written for Horovod {HOROVOD_VERSION}:\n  "
                + "\n  ".join(done.stdout.strip().splitlines()[-4:])
            )
