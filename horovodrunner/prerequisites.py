"""What has to be on the machine first: Java, a compiler, cmake. Runs in: the command line.

Standard library only, and no import of this package: the set-up script loads this file by its
path before anything is installed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

OLDEST_JAVA = 17
OLDEST_CMAKE = (3, 13)

INSTALL_SPARK = "pip install 'pyspark>=3.5' pyarrow pandas"
INSTALL_FRAMEWORK = "pip install torch, or pip install tensorflow"

_JAVA_REMEDY = (
    "install one (Debian/Ubuntu: apt install openjdk-17-jre-headless; "
    "conda: conda install -c conda-forge openjdk=17; macOS: brew install openjdk@17) "
    "or set JAVA_HOME"
)
_COMPILER_REMEDY = (
    "install one (Debian/Ubuntu: apt install g++; conda: conda install -c conda-forge "
    "cxx-compiler; macOS: xcode-select --install) or set CXX"
)
_CMAKE_REMEDY = (
    "install it (Debian/Ubuntu: apt install cmake; conda: conda install -c conda-forge cmake; "
    "macOS: brew install cmake; anywhere: pip install cmake)"
)
_MAKE_REMEDY = (
    "install it (Debian/Ubuntu: apt install make; conda: conda install -c conda-forge make; "
    "macOS: xcode-select --install)"
)
OLDEST_CXX = 17
# Each standard's part is compiled for it and for every later one.
_CXX_PROGRAMS = {
    17: """
#include <optional>
#include <string_view>
int in17() { if constexpr (sizeof(std::optional<std::string_view>) > 0) return 0; }
""",
    20: """
#include <bit>
#include <concepts>
template <std::unsigned_integral T> int in20(T number) { return std::bit_width(number); }
int used20() { return in20(8u); }
""",
}


class Problem(NamedTuple):
    """Something that is missing and how to get it; as a string, both in one line."""

    text: str
    remedy: str

    def __str__(self) -> str:
        """Join the two."""
        return f"{self.text}: {self.remedy}"


def output_of(command: list[str], *, stdin: str = "") -> tuple[int, str]:
    """Run a short command and return its exit code and its stdout and stderr together."""
    try:
        done = subprocess.run(
            command,
            input=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return 127, str(error)
    return done.returncode, done.stdout


def answer_of(program: str, *arguments: str, timeout: float | None = None) -> str:
    """Return what a program prints after ``answer:``, run by this Python; else a RuntimeError.

    The error's text is the last line that the program wrote to stderr.
    """
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
        timeout=timeout,
        check=False,
    )
    answers = [line[7:] for line in done.stdout.splitlines() if line.startswith("answer:")]
    if done.returncode != 0 or not answers:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise RuntimeError(last)
    return answers[0]


def _first_line(text: str) -> str:
    return next(iter(text.strip().splitlines()), "")


def java_command() -> str | None:
    """Return the ``java`` that Spark would start: JAVA_HOME's, else the first on PATH."""
    home = os.environ.get("JAVA_HOME")
    if home:
        return str(Path(home) / "bin" / "java")
    return shutil.which("java")


def java_major(text: str) -> int | None:
    """Read the major version out of what ``java -version`` prints (``1.8.0`` is 8)."""
    found = re.search(r'version "(?:1\.)?(\d+)', text)
    return int(found.group(1)) if found else None


def compiler_command() -> list[str] | None:
    """Return the C++ compiler that CMake would choose: CXX's, else the first known on PATH."""
    chosen = os.environ.get("CXX")
    if chosen:
        return chosen.split()
    names = ("c++", "g++", "clang++")
    return next(([found] for name in names if (found := shutil.which(name))), None)


def cmake_command() -> str | None:
    """Return the cmake that Horovod's build would run: HOROVOD_CMAKE, else the one on PATH."""
    return os.environ.get("HOROVOD_CMAKE") or shutil.which("cmake")


def java_problem() -> Problem | None:
    """Return why Spark would not start with the Java of this machine, if so."""
    command = java_command()
    if command is None:
        return Problem(f"no Java was found; Spark needs Java {OLDEST_JAVA} or newer", _JAVA_REMEDY)
    code, text = output_of([command, "-version"])
    major = java_major(text)
    if code != 0 or major is None:
        said = _first_line(text) or f"exit code {code}"
        return Problem(f"{command} -version failed ({said})", _JAVA_REMEDY)
    if major < OLDEST_JAVA:
        text = f"{command} is Java {major}; Spark needs {OLDEST_JAVA} or newer"
        return Problem(text, _JAVA_REMEDY)
    return None


def compiler_problem(standard: int = OLDEST_CXX, what: str = "Horovod") -> Problem | None:
    """Return why ``what``, which needs C++ ``standard``, cannot be compiled here, if so."""
    command = compiler_command()
    needs = f"building {what} needs C++{standard}"
    if command is None:
        return Problem(f"no C++ compiler was found; {needs}", _COMPILER_REMEDY)
    program = "".join(text for since, text in _CXX_PROGRAMS.items() if since <= standard)
    code, text = output_of(
        [*command, f"-std=c++{standard}", "-fsyntax-only", "-x", "c++", "-"], stdin=program
    )
    if code != 0:
        said = _first_line(text) or f"exit code {code}"
        text = f"{' '.join(command)} does not compile C++{standard} ({said}); {needs}"
        return Problem(text, _COMPILER_REMEDY)
    return None


def cmake_problem() -> Problem | None:
    """Return why CMake cannot drive the build here, if so."""
    command = cmake_command()
    if command is None:
        return Problem("cmake was not found; building Horovod needs 3.13", _CMAKE_REMEDY)
    _, text = output_of([command, "--version"])
    found = re.search(r"version (\d+)\.(\d+)", text)
    if not found:
        return Problem(f"{command} --version does not answer with a version", _CMAKE_REMEDY)
    if (int(found[1]), int(found[2])) < OLDEST_CMAKE:
        text = f"{command} is {found[0]}; building Horovod needs 3.13"
        return Problem(text, _CMAKE_REMEDY)
    if shutil.which("make") is None and "CMAKE_GENERATOR" not in os.environ:
        return Problem("make was not found; cmake needs it to build Horovod", _MAKE_REMEDY)
    return None


def patch_problem() -> Problem | None:
    """Return that nothing here can apply the patches to Horovod's sources, or None."""
    if shutil.which("git") or shutil.which("patch"):
        return None
    return Problem(
        "neither git nor patch was found; Horovod's sources are patched before they are built",
        "install one (Debian/Ubuntu: apt install patch; conda: conda install -c conda-forge patch)",
    )


def headers_problem() -> Problem | None:
    """Return that the headers of the running Python are missing, if so."""
    include = Path(sysconfig.get_path("include", "posix_prefix"))
    if (include / "Python.h").exists():
        return None
    return Problem(
        f"Python's headers are missing ({include / 'Python.h'}); building Horovod needs them",
        "install them (Debian/Ubuntu: apt install python3-dev; Fedora: dnf install python3-devel)",
    )


def build_problems(standard: int = OLDEST_CXX, what: str = "Horovod") -> list[Problem]:
    """List everything outside Python packages that a build of ``what`` in C++ lacks here."""
    found = (
        compiler_problem(standard, what),
        cmake_problem(),
        patch_problem(),
        headers_problem(),
    )
    return [problem for problem in found if problem]
