"""Compiles Horovod into a wheel. Runs in: the command line."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from horovodrunner import prerequisites
from horovodrunner.errors import HorovodBuildError
from horovodrunner.horovod_build.recipe import Recipe, find_cuda
from horovodrunner.horovod_build.sources import (
    CXX_VARIABLES,
    PIP,
    RECORD_NAME,
    Say,
    patched_sources,
)

# Import name and distribution name of what a build without isolation needs around it.
_BUILD_PACKAGES = {
    "setuptools": "setuptools",
    "wheel": "wheel",
    "packaging": "packaging",
    "yaml": "pyyaml",
    "cffi": "cffi",
    "cloudpickle": "cloudpickle",
    "psutil": "psutil",
}

_PROGRESS_SECONDS = 20.0

# What the compilers, the linker, CMake, make and Python write about a failure, most telling first.
_ERROR_LINES = (
    re.compile(r"^\S+:\d+(:\d+)?: (fatal )?error: |internal compiler error"),
    re.compile(r"^CMake Error|undefined reference to|^\S*ld\S*: "),
    re.compile(r"(fatal )?error: |^make.*\*\*\*|^\w*Error: ", re.IGNORECASE),
)
_HINTS = (
    (
        re.compile(r"Killed|Terminated program cc1plus|virtual memory exhausted"),
        "the machine ran out of memory; compile with fewer processes: MAKEFLAGS=-j1",
    ),
    (
        re.compile(r"Could NOT find NCCL"),
        "install NCCL with its headers (Debian/Ubuntu: apt install libnccl-dev) or set "
        "HOROVOD_NCCL_HOME; HOROVOD_GPU_OPERATIONS= (empty) builds without it",
    ),
)


def require_build_tools(recipe: Recipe, cxx: Mapping[str, int]) -> None:
    """Raise an error that names all that a build lacks, before anything is downloaded.

    `cxx` is the C++ standard that each framework needs, such as ``{"torch": 20}``.
    """
    framework, standard = max(cxx.items(), key=lambda item: item[1])
    found = prerequisites.build_problems(standard, f"Horovod for {framework}")
    problems = [str(problem) for problem in found]
    absent = [
        distribution
        for name, distribution in _BUILD_PACKAGES.items()
        if importlib.util.find_spec(name) is None
    ]
    if importlib.util.find_spec("pip") is None:
        problems.append(f"pip is not installed: {sys.executable} -m ensurepip")
    if absent:
        names = " ".join(absent)
        problems.append(f"Python packages are missing: {sys.executable} -m pip install {names}")
    home, lack = find_cuda()
    if recipe.gpu_operations == "NCCL" and home is None:
        problems.append(
            f"HOROVOD_GPU_OPERATIONS=NCCL needs the CUDA toolkit, and {lack}: install it "
            f"for CUDA {recipe.cuda or '(as torch)'} or set CUDA_HOME"
        )
    if problems:
        raise HorovodBuildError("Horovod cannot be built yet:\n  " + "\n  ".join(problems))


def make_wheel(recipe: Recipe, cxx: Mapping[str, int], work: Path, log: Path, say: Say) -> Path:
    """Fetch, patch and compile Horovod below `work`; `log` keeps the whole output."""
    source = patched_sources(work, say)
    record = json.dumps(asdict(recipe), indent=1)
    (source / "horovod" / RECORD_NAME).write_text(record, encoding="utf-8")
    return compile_wheel(recipe, cxx, source, log, say)


def build_environment(recipe: Recipe, cxx: Mapping[str, int]) -> dict[str, str]:
    environ = {name: v for name, v in os.environ.items() if not name.startswith("HOROVOD_WITH")}
    environ.update(recipe.variables())
    environ.update({CXX_VARIABLES[name]: str(standard) for name, standard in cxx.items()})
    if prerequisites.cmake_command():
        environ["HOROVOD_CMAKE"] = str(prerequisites.cmake_command())
    # Gloo's CMake file asks for a compatibility that CMake 4 gives only on request.
    environ.setdefault("CMAKE_POLICY_VERSION_MINIMUM", "3.5")
    flags = environ.get("MAKEFLAGS", "")
    if "-j" not in flags or "--jobserver" in flags:
        # A surrounding make's job server cannot be reached through pip.
        environ["MAKEFLAGS"] = f"-j{_cores()}"
    return environ


def compile_wheel(
    recipe: Recipe, cxx: Mapping[str, int], source: Path, log: Path, say: Say
) -> Path:
    """Compile with ``pip wheel``; a failure shows the first error and where the log is."""
    # Measured on two cores; CUDA kernels are compiled for every architecture of the toolkit.
    minutes = (1.5 * len(recipe.frameworks) + (2 if recipe.uses_cuda() else 0)) * 2 / _cores()
    say(
        f"compiling for {recipe} on {_cores()} cores: about {max(1, round(minutes))} to "
        f"{max(2, round(2 * minutes))} minutes"
    )
    say(f"  the full output goes to {log}")
    wheels = source.with_name("wheels")
    command = [*PIP, "wheel", "--verbose", "--no-deps", "--no-build-isolation"]
    command += ["--wheel-dir", str(wheels), str(source)]
    started = time.monotonic()
    with log.open("wb") as sink:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            env=build_environment(recipe, cxx),
            start_new_session=True,
        )
        try:
            while (code := _wait(process, _PROGRESS_SECONDS)) is None:
                say(f"  {_clock(time.monotonic() - started)} {_percent(log)}")
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
                process.wait()
    made = list(wheels.glob("horovod-*.whl"))
    if code != 0 or len(made) != 1:
        text = log.read_text(encoding="utf-8", errors="replace")
        raise HorovodBuildError(
            f"Horovod could not be compiled for {recipe} (exit code {code}). "
            f"The first error:\n{first_error(text)}\nThe full log: {log}"
        )
    say(f"  compiled in {_clock(time.monotonic() - started)}")
    return made[0]


def first_error(log: str, *, before: int = 2, after: int = 3) -> str:
    """Return the first error of a build's output with the lines around it, and a hint if any."""
    lines = log.splitlines()
    hits = (
        index
        for pattern in _ERROR_LINES
        for index, line in enumerate(lines)
        if pattern.search(line.strip())
    )
    index = next(hits, len(lines) - after - 1)
    shown = lines[max(0, index - before) : index + after + 1]
    text = "\n".join("  " + line.strip()[:300] for line in shown)
    hint = next((hint for pattern, hint in _HINTS if pattern.search(log)), None)
    return f"{text}\n  => {hint}" if hint else text


def _wait(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None


def _percent(log: Path) -> str:
    """Return how far make says it is, such as ``[ 45%]``."""
    marks = re.findall(rb"\[ *\d+%\]", log.read_bytes())
    return marks[-1].decode() if marks else "preparing"


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d} min"


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
