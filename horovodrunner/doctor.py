"""Reports what would go wrong on this machine, and what to do. Runs in: the command line.

Frameworks are imported in processes of their own, so that looking at a GPU takes none of its
memory and a broken installation cannot take the doctor down with it.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import ipaddress
import os
import platform
import runpy
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, NamedTuple

import psutil

from horovodrunner import drop_in, prerequisites
from horovodrunner.errors import ConfigurationError
from horovodrunner.horovod_build import check_horovod
from horovodrunner.horovod_build.recipe import (
    distribution_of,
    find_cuda,
    framework_versions,
    torch_cuda,
)
from horovodrunner.placement.packed import PackedEnvironment

_BUILD = "python -m horovodrunner build-horovod"
_IMPORT_SECONDS = 90.0
_PROGRAMS = {
    "torch": """
import torch
print(f"answer:CUDA {torch.version.cuda}, {torch.cuda.device_count()} GPUs"
      if torch.version.cuda else "answer:CPU build")
""",
    "tensorflow": """
import tensorflow as tf
gpus = len(tf.config.list_physical_devices("GPU"))
print(f"answer:{gpus} GPUs" if tf.test.is_built_with_cuda() else "answer:CPU build")
""",
}


class Finding(NamedTuple):
    """One line of the report: a problem stops a run, a note is good to know."""

    verdict: Literal["ok", "problem", "note"]
    text: str
    remedy: str = ""


def run_doctor(say: Callable[[str], None] = print) -> int:
    """Pass the report to `say`, line by line, and return 1 if it holds a problem, else 0."""
    problems = 0
    for subject, findings in examine():
        for finding in findings:
            problems += finding.verdict == "problem"
            say(f"{finding.verdict:<8} {subject:<11} {finding.text}")
            if finding.remedy:
                say(f"{'':<8} {'':<11} -> {finding.remedy}")
    say(f"\n{problems} problem{'s' * (problems != 1)} found" if problems else "\nno problem found")
    return 1 if problems else 0


def examine() -> Iterator[tuple[str, Iterable[Finding]]]:
    """Examine everything, by subject, in the order of a run: from Python to the network."""
    with ThreadPoolExecutor() as pool:  # frameworks are slow, and ready when their line comes
        frameworks = [
            (name, pool.submit(_framework, name, version, _PROGRAMS[name]))
            for name, version in framework_versions().items()
        ]
        yield "Python", [_python(), *_packed()]
        yield "executors", _worker_python()
        yield "Java", [_java()]
        yield "Spark", _spark()
        for name, framework in frameworks:
            yield name, [framework.result()]
    yield "Horovod", [_horovod()]
    yield "sparkdl", _sparkdl()
    yield "GPUs", _gpus()
    yield "NIC", _interfaces()
    yield "host name", [_host_name()]


def _python() -> Finding:
    memory = psutil.virtual_memory()
    has_affinity = hasattr(psutil.Process, "cpu_affinity")  # not on macOS
    cores = len(psutil.Process().cpu_affinity()) if has_affinity else psutil.cpu_count()
    return Finding(
        "ok",
        f"{platform.python_version()} ({sys.executable}), {cores} cores, "
        f"{memory.available / 2**30:.0f} of {memory.total / 2**30:.0f} GiB memory free",
    )


def _packed() -> Iterator[Finding]:
    """Look whether an environment that was packed elsewhere fits this machine."""
    packed = PackedEnvironment.of_this_process()
    if packed is None:
        return
    if problem := packed.problem_here():
        yield Finding("problem", problem)
    else:
        yield Finding("ok", f"packed environment {packed.digest[:12]} for {packed.machine}")


def _worker_python() -> Iterator[Finding]:
    """Compare the Python that executors are told to use with this one."""
    other = os.environ.get("PYSPARK_PYTHON")
    if not other:
        return
    program = "import sys; print('%d.%d' % sys.version_info[:2]); print(sys.prefix)"
    code, text = prerequisites.output_of([other, "-c", program])
    if code != 0:
        yield Finding(
            "note",
            f"PYSPARK_PYTHON={other} cannot be run on this machine ({text.strip()[:80]})",
            "make sure that it exists on every executor, with the same packages as here",
        )
        return
    version, prefix = text.split("\n")[:2]
    ours = f"{sys.version_info.major}.{sys.version_info.minor}"
    if version != ours:
        yield Finding(
            "problem",
            f"PYSPARK_PYTHON={other} is Python {version}, this is Python {ours}",
            f"Spark refuses to mix them: set PYSPARK_PYTHON={sys.executable}",
        )
    elif prefix != sys.prefix:
        yield Finding(
            "note",
            f"PYSPARK_PYTHON={other} is another environment ({prefix}) than this one",
            f"executors see its packages only; for this one set PYSPARK_PYTHON={sys.executable}",
        )
    else:
        yield Finding("ok", f"PYSPARK_PYTHON={other} is this environment")


def _java() -> Finding:
    problem = prerequisites.java_problem()
    if problem:
        return Finding("problem", problem.text, problem.remedy)
    command = prerequisites.java_command() or "java"
    _, text = prerequisites.output_of([command, "-version"])
    return Finding("ok", f"{prerequisites.java_major(text)} ({command})")


def _spark() -> Iterator[Finding]:
    spec = importlib.util.find_spec("pyspark")
    if spec is None or spec.origin is None:
        yield Finding(
            "problem",
            "pyspark is not installed; only np < 0 works without it",
            prerequisites.INSTALL_SPARK,
        )
        return
    # The imported one counts: SPARK_HOME's pyspark has no distribution that pip knows.
    version = str(runpy.run_path(str(Path(spec.origin).with_name("version.py")))["__version__"])
    yield Finding("ok", f"pyspark {version} ({Path(spec.origin).parent})")
    home = os.environ.get("SPARK_HOME")
    if home and not Path(home, "bin", "spark-submit").exists():
        yield Finding(
            "problem",
            f"SPARK_HOME={home} holds no bin/spark-submit",
            "unset SPARK_HOME to use the Spark that comes with pyspark, or correct it",
        )
    absent = [name for name in ("pyarrow", "pandas") if importlib.util.find_spec(name) is None]
    if absent:
        yield Finding(
            "problem",
            f"{' and '.join(absent)} missing: the barrier stage exchanges Arrow batches",
            f"pip install {' '.join(absent)}",
        )


def _framework(name: str, version: str, program: str) -> Finding:
    try:
        answer = prerequisites.answer_of(program, timeout=_IMPORT_SECONDS)
    except subprocess.TimeoutExpired:
        return Finding(
            "problem",
            f"{version}: its import takes longer than {_IMPORT_SECONDS:.0f} s",
            "look at the disk and the GPU driver (nvidia-smi)",
        )
    except RuntimeError as error:
        return Finding(
            "problem",
            f"{version} is installed but cannot be imported: {str(error)[:160]}",
            f"pip install --force-reinstall {distribution_of(name)}=={version.partition('+')[0]}",
        )
    return Finding("ok", f"{version}, {answer}")


def _horovod() -> Finding:
    try:
        status = check_horovod()
    except ConfigurationError:
        return Finding(
            "problem",
            "neither torch nor tensorflow is installed",
            f"{prerequisites.INSTALL_FRAMEWORK}, then {_BUILD}",
        )
    if status.state == "missing":
        text = f"{status.text}, and needed only by a main that imports it"
        return Finding("note", text, _BUILD)
    if not status.fits:
        return Finding("problem", status.text, _BUILD)
    return Finding("ok", status.text)


def _sparkdl() -> Iterator[Finding]:
    found = drop_in.find_sparkdl()
    if found is None:
        return
    others = drop_in.other_sparkdls(found.path)
    if not found.is_ours:
        yield Finding(
            "note",
            f"{found.path} is what gets imported; that is not horovodrunner's",
            drop_in.remedy(),
        )
    elif others:
        yield Finding(
            "note",
            f"horovodrunner's is imported ({found.path}); it hides {', '.join(others)}",
            drop_in.remedy(),
        )
    else:
        yield Finding("ok", f"horovodrunner's ({found.path})")


def _gpus() -> Iterator[Finding]:
    query = ["nvidia-smi", "--query-gpu=index,name,memory.total,driver_version"]
    code, text = prerequisites.output_of([*query, "--format=csv,noheader"])
    if code == 127:
        yield Finding("ok", "none (no nvidia-smi): training runs on the CPU")
    elif code != 0:
        yield Finding(
            "problem",
            f"nvidia-smi failed with exit code {code}: {text.strip()[:120]}",
            "repair the NVIDIA driver, or remove it if this machine has no GPU",
        )
    else:
        for line in text.strip().splitlines():
            yield Finding("ok", line.strip())
        home, lack = find_cuda()
        if torch_cuda() and home is None:
            yield Finding(
                "problem",
                f"torch has CUDA {torch_cuda()}, but its compiler is not here ({lack}), so Horovod "
                "cannot be built for them",
                f"install that toolkit or set CUDA_HOME, then {_BUILD}",
            )


def _addresses() -> dict[str, list[str]]:
    """Return the IPv4 addresses of each interface that is up."""
    up = psutil.net_if_stats()
    return {
        name: ipv4
        for name, addresses in sorted(psutil.net_if_addrs().items())
        if (ipv4 := [a.address for a in addresses if a.family == socket.AF_INET])
        and name in up
        and up[name].isup
    }


def _has_other_than_loopback() -> bool:
    return any(not _is_loopback(address) for ipv4 in _addresses().values() for address in ipv4)


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback


def _interfaces() -> Iterator[Finding]:
    for name, ipv4 in _addresses().items():
        yield Finding("ok", f"{name}: {', '.join(ipv4)}")
    if not _has_other_than_loopback():
        yield Finding("note", "only the loopback: runs on this machine alone will work")


def _host_name() -> Finding:
    host = socket.gethostname()
    try:
        address = socket.gethostbyname(host)
    except OSError:
        if local := os.environ.get("SPARK_LOCAL_IP"):
            return Finding("note", f"{host} has no address, but SPARK_LOCAL_IP={local}")
        return Finding(
            "problem", f"{host} has no address", "add it to /etc/hosts, or set SPARK_LOCAL_IP"
        )
    if _is_loopback(address) and _has_other_than_loopback():
        return Finding(
            "note",
            f"{host} is {address}: Spark will choose one of the other addresses",
            "on a cluster set SPARK_LOCAL_IP to the address that the executors reach",
        )
    return Finding("ok", f"{host} is {address}")
