"""What Horovod has to be built for, and what it was built for. Runs in: the command line."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import runpy
import shutil
import sys
import sysconfig
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from horovodrunner import prerequisites
from horovodrunner.errors import ConfigurationError, HorovodBuildError
from horovodrunner.horovod_build.sources import (
    HOROVOD_VERSION,
    RECORD_NAME,
    WITHOUT_CUDA,
    fingerprint,
)

HOROVOD_NAMES = {"torch": "pytorch", "tensorflow": "tensorflow"}
"""How Horovod spells each framework, in its metadata.json and (in capitals) its variables."""

# Variables of the environment that change what Horovod's build makes. Horovod's many run-time
# variables (HOROVOD_TIMELINE, HOROVOD_CACHE_CAPACITY, ...) are not among them.
_FLAG_PREFIXES = ("HOROVOD_NCCL_", "HOROVOD_GPU", "HOROVOD_BUILD_", "HOROVOD_WITH")
_FLAG_NAMES = (
    "HOROVOD_ALLOW_MIXED_GPU_IMPL",
    "HOROVOD_CPU_OPERATIONS",
    "HOROVOD_CUDA_HOME",
    "HOROVOD_DEBUG",
    "HOROVOD_ROCM_HOME",
    "CFLAGS",
    "CXXFLAGS",
    "LDFLAGS",
)

# Run by the Python that will import Horovod; argv names the frameworks. Paths are left out, so
# that two environments with the same packages get the same answer.
_FRAMEWORK_PROGRAM = """
import json, pathlib, re, sys
abi = {}
settings = {}
if "torch" in sys.argv:
    import torch
    abi["torch"] = [torch.__version__, torch.version.cuda, torch.compiled_with_cxx11_abi()]
    # What torch tells CMake, and what it compiles extensions with.
    config = pathlib.Path(torch.utils.cmake_prefix_path, "Torch", "TorchConfig.cmake")
    flags = pathlib.Path(torch.__file__).with_name("utils") / "cpp_extension.py"
    settings["torch"] = "".join(file.read_text() for file in (config, flags) if file.exists())
if "tensorflow" in sys.argv:
    import tensorflow as tf
    flags = [flag for flag in tf.sysconfig.get_compile_flags() if not flag.startswith("-I")]
    abi["tensorflow"] = [tf.__version__, *flags]
    settings["tensorflow"] = " ".join(flags)
pattern = r"(?:CXX_STANDARD\\s+|-std=c[+][+])(\\d\\d)\\b"
cxx = {name: max(map(int, re.findall(pattern, text)), default=0) for name, text in settings.items()}
print("answer:" + json.dumps({"abi": abi, "cxx": cxx}))
"""


@dataclass(frozen=True)
class Recipe:
    """What a build of Horovod is made for; read without importing any framework."""

    horovod: str
    edits: str
    """Fingerprint of the patches."""
    python: str
    """ABI tag of the interpreter, such as ``cpython-311-x86_64-linux-gnu``."""
    frameworks: dict[str, str]
    """Versions by import name."""
    cuda: str | None
    """CUDA version that torch was built with; None for a CPU build."""
    gpu_operations: str
    """Value of HOROVOD_GPU_OPERATIONS; empty for none."""
    flags: dict[str, str]
    """The variables that change the build, as the user set them."""

    def __str__(self) -> str:
        """Return the frameworks, as in ``torch 2.13.0, tensorflow 2.21.0 (CPU)``."""
        names = ", ".join(f"{name} {version}" for name, version in self.frameworks.items())
        return f"{names} ({self.gpu_operations or 'CPU'})"

    def uses_cuda(self) -> bool:
        """Return whether anything is compiled for CUDA: it is wanted, and its compiler is here."""
        asked = any(self.flags[name] for name in self.flags if name.startswith("HOROVOD_GPU_"))
        return bool(self.cuda or self.gpu_operations or asked) and cuda_home() is not None

    def variables(self) -> dict[str, str]:
        """Return the environment variables that tell Horovod's build what to make."""
        names = ("HOROVOD_WITH_GLOO", "HOROVOD_WITHOUT_MPI", "HOROVOD_WITHOUT_MXNET")
        variables = dict.fromkeys(names, "1")
        for name, spelled in HOROVOD_NAMES.items():
            with_or_without = "WITH" if name in self.frameworks else "WITHOUT"
            variables[f"HOROVOD_{with_or_without}_{spelled.upper()}"] = "1"
        variables.update(self.flags)
        home = cuda_home()
        if home and self.uses_cuda():  # Horovod and torch have to look at the same toolkit
            variables.update(HOROVOD_CUDA_HOME=home, CUDA_HOME=home)
        else:
            variables[WITHOUT_CUDA] = "1"
        if self.gpu_operations:
            variables["HOROVOD_GPU_OPERATIONS"] = self.gpu_operations
            nccl = torch_nccl()
            if nccl and not any(name.startswith("HOROVOD_NCCL_") for name in self.flags):
                # Two different NCCLs in one process do not work together.
                variables.update(HOROVOD_NCCL_HOME=str(nccl), HOROVOD_NCCL_LINK="SHARED")
        return variables


@dataclass(frozen=True)
class Status:
    """How the installed Horovod fits the installed frameworks.

    ``ready`` was built and verified by build-horovod; ``foreign`` was built by another tool for
    the right versions; ``stale`` was built for something else.
    """

    state: Literal["ready", "foreign", "stale", "missing"]
    text: str

    @property
    def fits(self) -> bool:
        return self.state in ("ready", "foreign")


def framework_versions() -> dict[str, str]:
    """Return the installed frameworks, less what HOROVOD_WITHOUT_... leaves out, with versions."""
    owners = importlib.metadata.packages_distributions()
    found = {}
    for name, spelled in HOROVOD_NAMES.items():
        left_out = os.environ.get(f"HOROVOD_WITHOUT_{spelled.upper()}") == "1"
        if name in owners and not left_out:
            found[name] = importlib.metadata.version(owners[name][0])
    if "torch" in found:
        # torch calls itself 2.13.0+cu130 where its package is 2.13.0; Horovod notes the former.
        found["torch"] = str(_torch_version_file().get("__version__", found["torch"]))
    return found


def distribution_of(name: str) -> str:
    """Return what pip calls the package with that import name, such as ``tensorflow-cpu``."""
    owners = importlib.metadata.packages_distributions().get(name)
    return owners[0].replace("_", "-") if owners else name


def torch_cuda() -> str | None:
    """Return the CUDA version the installed torch was built with, without importing torch."""
    cuda = _torch_version_file().get("cuda")
    return str(cuda) if cuda else None


def cuda_home() -> str | None:
    """Return where the CUDA toolkit is, if there is one whose compiler runs."""
    return find_cuda()[0]


def find_cuda() -> tuple[str | None, str]:
    """Return where the CUDA toolkit is, or what it lacks.

    A machine with CUDA's runtime alone has no nvcc or no headers.
    """
    for name in ("HOROVOD_CUDA_HOME", "CUDA_HOME", "CUDA_PATH"):
        home = os.environ.get(name)
        if home:
            lack = _lack_of_toolkit(Path(home))
            return (None, f"{name}: {lack}") if lack else (home, "")
    homes = [Path("/usr/local/cuda")]
    nvcc = shutil.which("nvcc")
    if nvcc:
        # nvcc on PATH can also be a script that starts the one of the toolkit.
        homes.insert(0, Path(nvcc).resolve().parent.parent)
    lacks = [_lack_of_toolkit(home) for home in homes]
    found = next((home for home, lack in zip(homes, lacks, strict=True) if not lack), None)
    return (str(found), "") if found else (None, "; ".join(lacks))


def _lack_of_toolkit(home: Path) -> str:
    """Name what a CUDA toolkit lacks to compile with, as in ``/usr/local/cuda has no nvcc``."""
    nvcc = home / "bin" / "nvcc"
    if not nvcc.exists():
        return f"{home} has no bin/nvcc"
    # Through a shell, as make starts it: a wrapper on PATH may be a script without a first line.
    code, text = prerequisites.output_of(["/bin/sh", "-c", '"$0" --version', str(nvcc)])
    if code != 0:
        said = (text.strip().splitlines() or [""])[-1][:120]
        return f"{nvcc} does not run (exit code {code}: {said})"
    headers = ("include", "targets/x86_64-linux/include", "targets/sbsa-linux/include")
    if not any((home / folder / "cuda_runtime.h").exists() for folder in headers):
        return f"{home} has no cuda_runtime.h"
    return ""


def torch_nccl() -> Path | None:
    """Return the folder of the NCCL package that torch brings along, if it does."""
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if Path(folder, "nccl", "include", "nccl.h").exists():
            return Path(folder, "nccl")
    return None


def current_recipe() -> Recipe:
    """Return what Horovod has to be built for in this environment."""
    frameworks = framework_versions()
    if not frameworks:
        raise ConfigurationError(
            f"neither torch nor tensorflow is installed for {sys.executable}, so there is nothing "
            f"to build Horovod for; install one: {prerequisites.INSTALL_FRAMEWORK}"
        )
    cuda = torch_cuda() if "torch" in frameworks else None
    operations = "NCCL" if cuda and cuda_home() else ""
    flags = {
        name: value
        for name, value in sorted(os.environ.items())
        if name in _FLAG_NAMES or name.startswith(_FLAG_PREFIXES)
    }
    return Recipe(
        horovod=HOROVOD_VERSION,
        edits=fingerprint(),
        python=str(sysconfig.get_config_var("SOABI")),
        frameworks=frameworks,
        cuda=cuda,
        gpu_operations=flags.get("HOROVOD_GPU_OPERATIONS", operations),
        flags=flags,
    )


def cache_key(recipe: Recipe, toolchain: dict[str, Any]) -> str:
    """Return the name a wheel is cached under: a hash of everything it depends on."""
    facts = {**asdict(recipe), "toolchain": toolchain}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]


def toolchain_facts(recipe: Recipe) -> dict[str, Any]:
    """Read what else a wheel depends on: compilers, C++ ABIs and standards, the processor.

    The frameworks are imported for this, in a process of their own, before minutes are spent on a
    build.
    """
    try:
        answer = json.loads(prerequisites.answer_of(_FRAMEWORK_PROGRAM, *recipe.frameworks))
    except RuntimeError as error:
        raise HorovodBuildError(
            f"the installed {recipe} cannot be imported by {sys.executable} ({error}); "
            "repair that first, then build Horovod"
        ) from error
    compiler = prerequisites.compiler_command() or ["c++"]
    return {
        "abi": answer["abi"],
        "cxx": {name: max(said, prerequisites.OLDEST_CXX) for name, said in answer["cxx"].items()},
        "platform": [platform.system(), platform.machine(), platform.libc_ver()],
        "processor": _vector_extensions(),
        "compiler": _version(compiler).split("\n", 1)[0],
        "cmake": _version([prerequisites.cmake_command() or "cmake"]).split("\n", 1)[0],
        "nvcc": _version([f"{cuda_home()}/bin/nvcc"]) if recipe.uses_cuda() else None,
    }


def horovod_folder() -> Path | None:
    """Return the folder of the installed horovod package, without importing it."""
    spec = importlib.util.find_spec("horovod")
    return Path(spec.origin).parent if spec and spec.origin else None


def installed_status(recipe: Recipe, package: Path | None) -> Status:
    """Compare the Horovod in the folder ``package`` with what this environment needs."""
    if package is None:
        return Status("missing", "Horovod is not installed")
    built_for = _read_json(package / "metadata.json")
    for name, version in recipe.frameworks.items():
        theirs = built_for.get(HOROVOD_NAMES[name])
        if theirs != version:
            was = f"for {name} {theirs}" if theirs else f"without {name}"
            return Status(
                "stale", f"the installed Horovod was built {was}; {name} {version} is installed"
            )
    record = _read_json(package / RECORD_NAME)
    if not record:
        return Status("foreign", f"Horovod was built by another tool for {recipe}")
    change = _first_change(recipe, record)
    if change:
        return Status("stale", f"the installed Horovod was built with {change}")
    return Status("ready", f"Horovod {recipe.horovod} is built for {recipe}")


def _torch_version_file() -> dict[str, Any]:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return {}
    version_file = Path(spec.origin).with_name("version.py")
    return runpy.run_path(str(version_file)) if version_file.exists() else {}


def _first_change(recipe: Recipe, record: dict[str, Any]) -> str | None:
    """Name the first thing in which a new build would differ from the recorded one."""
    now = asdict(recipe)
    for field in ("horovod", "edits", "python", "cuda"):
        if record.get(field) != now[field]:
            return f"{field} {record.get(field)!r}; now it would be {now[field]!r}"
    flags = record.get("flags", {})
    # Flags are often set for the build alone: only one that says something else now counts.
    for name, value in recipe.flags.items():
        if name.startswith("HOROVOD_") and flags.get(name) != value:
            return f"{name}={flags.get(name, '')}; now it is {value}"
    found = recipe.gpu_operations
    if found and "HOROVOD_GPU_OPERATIONS" not in flags and record.get("gpu_operations") != found:
        return f"no GPU operations; now CUDA is found and it would be {found}"
    return None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _version(command: list[str]) -> str:
    _, text = prerequisites.output_of([*command, "--version"])
    return text.strip()


def _vector_extensions() -> list[str]:
    """List the processor's extensions for which Horovod's build turns on compiler flags."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return []
    return [name for name in ("avx", "f16c", "fma") if f" {name} " in text]
