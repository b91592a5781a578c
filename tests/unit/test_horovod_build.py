"""The parts of build-horovod that need no compiler and no Horovod."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import sys
import zipfile
from pathlib import Path

import psutil
import pytest

from horovodrunner.errors import ConfigurationError, HorovodBuildError
from horovodrunner.horovod_build import install, wheel
from horovodrunner.horovod_build.recipe import (
    Recipe,
    cache_key,
    cuda_home,
    current_recipe,
    find_cuda,
    installed_status,
    toolchain_facts,
)
from horovodrunner.horovod_build.sources import (
    CXX_VARIABLES,
    PATCHES,
    RECORD_NAME,
    WITHOUT_CUDA,
    apply_patches,
    fingerprint,
)
from horovodrunner.horovod_build.verify import verify_allreduce
from tests import processes

RECIPE = Recipe(
    horovod="0.28.1",
    edits="e1",
    python="cpython-311",
    frameworks={"torch": "2.13.0", "tensorflow": "2.21.0"},
    cuda=None,
    gpu_operations="",
    flags={},
)
CXX = {"torch": 17, "tensorflow": 17}
TOOLCHAIN = {
    "abi": {"torch": ["2.13.0", None, True]},
    "cxx": CXX,
    "compiler": "g++ 12",
    "cmake": "3.25",
}


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOROVOD_GPU_OPERATIONS", "HOROVOD_CUDA_HOME", "CXXFLAGS", "MAKEFLAGS"):
        monkeypatch.delenv(name, raising=False)


def added_by(name: str) -> str:
    """Return the lines that a patch adds."""
    [patch] = [patch for patch in PATCHES if name in patch.name]
    lines = patch.read_text().partition("--- a/")[2].splitlines()
    return "\n".join(line[1:] for line in lines if re.match(r"\+(?!\+\+ )", line))


class TestPatches:
    PATCH = "Why.\n\n--- a/file\n+++ b/file\n@@ -1,3 +1,3 @@\n before\n-old\n+new\n after\n"

    @pytest.fixture
    def patch(self, tmp_path: Path) -> Path:
        path = tmp_path / "01-why.patch"
        path.write_text(self.PATCH)
        return path

    @pytest.fixture(params=["git", "patch"])
    def source(
        self, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> Path:
        """Make a folder for sources, on a machine with one of the tools."""
        found = shutil.which(request.param)
        if found is None:
            pytest.skip(f"needs {request.param}")
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin" / request.param).symlink_to(found)
        monkeypatch.setenv("PATH", str(tmp_path / "bin"))
        folder = tmp_path / "horovod"
        folder.mkdir()
        return folder

    def test_one_is_applied(self, source: Path, patch: Path) -> None:
        (source / "file").write_text("before\nold\nafter\n")
        apply_patches(source, [patch])
        assert (source / "file").read_text() == "before\nnew\nafter\n"
        assert [path.name for path in source.iterdir()] == ["file"]

    @pytest.mark.parametrize("text", ["before\nother\nafter\n", "before\nold\nelse\n", None])
    def test_sources_that_it_was_not_written_for_are_an_error_that_names_it(
        self, text: str | None, source: Path, patch: Path
    ) -> None:
        if text is not None:
            (source / "file").write_text(text)
        with pytest.raises(HorovodBuildError, match=r"01-why.patch.*0\.28\.1(.|\n)*file"):
            apply_patches(source, [patch])

    @pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
    def test_one_is_applied_inside_a_repository(self, tmp_path: Path, patch: Path) -> None:
        processes.run(["git", "init", "--quiet", str(tmp_path)], check=True)
        source = tmp_path / "horovod"
        source.mkdir()
        (source / "file").write_text("before\nold\nafter\n")
        apply_patches(source, [patch])
        assert "new" in (source / "file").read_text()

    @pytest.mark.parametrize("change", [("file", "other"), ("old", "odd"), ("new", "newer")])
    def test_the_fingerprint_follows_what_one_does(
        self, change: tuple[str, str], patch: Path
    ) -> None:
        before = fingerprint([patch])
        patch.write_text(self.PATCH.replace(*change))
        assert fingerprint([patch]) != before

    def test_the_fingerprint_ignores_how_one_is_explained(self, patch: Path) -> None:
        before = fingerprint([patch])
        patch.write_text(self.PATCH.replace("Why.", "In better words."))
        assert fingerprint([patch]) == before

    def test_each_begins_with_its_reason(self) -> None:
        assert len(PATCHES) > 10
        for patch in PATCHES:
            reason, _, changes = patch.read_text().partition("\n\n--- a/")
            assert reason.endswith("."), patch.name
            assert "\n@@ " in changes, patch.name


@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")
@pytest.mark.parametrize("is_cuda_build", [True, False])
def test_a_tensorflow_without_cuda_gets_no_gpu_code(is_cuda_build: bool, tmp_path: Path) -> None:
    """Beside a torch with CUDA: what CMake compiles for it, and with which definitions."""
    module = "import types\n"
    module += f"info = {{'is_cuda_build': {is_cuda_build}}}\n"
    module += "sysconfig = types.SimpleNamespace(get_build_info=lambda: info)\n"
    (tmp_path / "tensorflow.py").write_text(module)
    folder = "/the/gpu/horovod/common/ops"
    sources = f"{folder}/gloo_operations.cc {folder}/cuda_operations.cc {folder}/nccl_operations.cc"
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.13)\n"
        "project(edited NONE)\n"
        f"set(PY_EXE {sys.executable})\n"
        "set(HAVE_CUDA TRUE)\n"
        f"set(SOURCES {sources} {folder}/gpu_operations.cc)\n"
        "set(LINKER_LIBS /lib/libnccl.so.2 gloo)\n"
        "add_definitions(-DHAVE_GLOO=1 -DHAVE_CUDA=1 -DHAVE_GPU=1 -DHAVE_NCCL=1)\n"
        "add_definitions(-DHOROVOD_GPU_ALLREDUCE=78)\n"
        f"{added_by('tensorflow-for-cpus')}\n"
        "get_directory_property(left COMPILE_DEFINITIONS)\n"
        'message(STATUS "left: ${HAVE_CUDA} ${SOURCES} ${LINKER_LIBS} ${left}")\n'
    )
    done = processes.run(
        ["cmake", "-S", str(tmp_path), "-B", str(tmp_path / "build")],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        check=True,
    )
    [left] = [line for line in done.stdout.splitlines() if "left:" in line]
    if is_cuda_build:
        assert {"nccl_operations.cc", "libnccl.so.2", "HOROVOD_GPU_ALLREDUCE=78"} <= set(
            re.split("[/; ]", left)
        )
    else:
        assert left == f"-- left: FALSE {folder}/gloo_operations.cc gloo HAVE_GLOO=1"


class TestRecipe:
    @pytest.mark.parametrize(
        "change",
        [
            {"horovod": "0.29.0"},
            {"edits": "e2"},
            {"python": "cpython-312"},
            {"frameworks": {"torch": "2.13.1", "tensorflow": "2.21.0"}},
            {"frameworks": {"torch": "2.13.0", "tensorflow": "2.22.0"}},
            {"frameworks": {"torch": "2.13.0"}},
            {"cuda": "12.8"},
            {"gpu_operations": "NCCL"},
            {"flags": {"CXXFLAGS": "-O1"}},
        ],
        ids=str,
    )
    def test_every_ingredient_changes_the_cache_key(self, change: dict[str, object]) -> None:
        changed = dataclasses.replace(RECIPE, **change)  # type: ignore[arg-type]
        assert cache_key(changed, TOOLCHAIN) != cache_key(RECIPE, TOOLCHAIN)

    @pytest.mark.parametrize("name", TOOLCHAIN)
    def test_every_tool_changes_the_cache_key(self, name: str) -> None:
        assert cache_key(RECIPE, {**TOOLCHAIN, name: "other"}) != cache_key(RECIPE, TOOLCHAIN)

    def test_the_cache_key_does_not_depend_on_order(self) -> None:
        backwards = dict(reversed(TOOLCHAIN.items()))
        assert cache_key(RECIPE, backwards) == cache_key(RECIPE, TOOLCHAIN)

    def test_only_installed_frameworks_are_built(self) -> None:
        variables = dataclasses.replace(RECIPE, frameworks={"torch": "2.13.0"}).variables()
        assert variables["HOROVOD_WITH_PYTORCH"] == "1"
        assert variables["HOROVOD_WITHOUT_TENSORFLOW"] == "1"
        assert "HOROVOD_GPU_OPERATIONS" not in variables

    def test_cuda_asks_for_nccl(self) -> None:
        recipe = dataclasses.replace(RECIPE, cuda="12.8", gpu_operations="NCCL")
        assert recipe.variables()["HOROVOD_GPU_OPERATIONS"] == "NCCL"

    def test_torchs_own_nccl_is_used_unless_the_user_names_another(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        header = tmp_path / "nvidia" / "nccl" / "include" / "nccl.h"
        header.parent.mkdir(parents=True)
        header.touch()
        monkeypatch.syspath_prepend(str(tmp_path))
        gpu = dataclasses.replace(RECIPE, cuda="13.0", gpu_operations="NCCL")
        assert gpu.variables()["HOROVOD_NCCL_HOME"] == str(tmp_path / "nvidia" / "nccl")
        own = dataclasses.replace(gpu, flags={"HOROVOD_NCCL_HOME": "/mine"})
        assert own.variables()["HOROVOD_NCCL_HOME"] == "/mine"
        assert "HOROVOD_NCCL_LINK" not in own.variables()
        assert "HOROVOD_NCCL_HOME" not in RECIPE.variables()

    def test_build_flags_count_and_run_time_settings_do_not(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = current_recipe()
        monkeypatch.setenv("HOROVOD_TIMELINE", "/tmp/timeline.json")
        assert current_recipe() == before
        monkeypatch.setenv("HOROVOD_GPU_OPERATIONS", "NCCL")
        assert current_recipe().gpu_operations == "NCCL"
        monkeypatch.setenv("CXXFLAGS", "-O1")
        assert current_recipe().flags["CXXFLAGS"] == "-O1"

    def test_torchs_own_version_counts_not_its_packages(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """PyPI's torch 2.13.0 calls itself 2.13.0+cu130, and Horovod's build writes that down."""
        (tmp_path / "torch").mkdir()
        (tmp_path / "torch" / "__init__.py").touch()
        version = "__version__ = '2.13.0+cu130'\ncuda = '13.0'\n"
        (tmp_path / "torch" / "version.py").write_text(version)
        info = tmp_path / "torch-2.13.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.13.0\n")
        (info / "top_level.txt").write_text("torch\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.delitem(sys.modules, "torch", raising=False)
        recipe = current_recipe()
        assert recipe.frameworks["torch"] == "2.13.0+cu130"
        assert recipe.cuda == "13.0"

    def test_nothing_to_build_for_is_an_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOROVOD_WITHOUT_PYTORCH", "1")
        monkeypatch.setenv("HOROVOD_WITHOUT_TENSORFLOW", "1")
        with pytest.raises(ConfigurationError, match="neither torch nor tensorflow"):
            current_recipe()


class TestCuda:
    """A folder stands for the toolkit, and a script in it for its compiler."""

    @pytest.fixture
    def toolkit(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        for name in ("HOROVOD_CUDA_HOME", "CUDA_HOME", "CUDA_PATH"):
            monkeypatch.delenv(name, raising=False)
        (tmp_path / "include").mkdir()
        (tmp_path / "include" / "cuda_runtime.h").touch()
        self.write_nvcc(tmp_path, "echo release 13.0")
        monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
        return tmp_path

    def write_nvcc(self, home: Path, command: str) -> None:
        (home / "bin").mkdir(exist_ok=True)
        (home / "bin" / "nvcc").write_text(f"#!/bin/sh\n{command}\n")
        (home / "bin" / "nvcc").chmod(0o755)

    def test_the_one_on_the_path_with_its_headers(self, toolkit: Path) -> None:
        assert cuda_home() == str(toolkit)

    def test_a_script_on_the_path_has_no_headers(self, toolkit: Path) -> None:
        (toolkit / "include" / "cuda_runtime.h").unlink()
        assert cuda_home() != str(toolkit)

    @pytest.mark.parametrize("command", ["exec /no/such/nvcc", "echo broken; exit 1", "kill -9 $$"])
    def test_a_compiler_that_does_not_run_counts_as_none(
        self, command: str, toolkit: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.write_nvcc(toolkit, command)
        assert cuda_home() != str(toolkit)
        monkeypatch.setenv("CUDA_HOME", str(toolkit))
        home, lack = find_cuda()
        assert home is None
        assert f"CUDA_HOME: {toolkit}/bin/nvcc does not run" in lack
        assert "\n" not in lack

    @pytest.mark.parametrize("name", ["HOROVOD_CUDA_HOME", "CUDA_HOME", "CUDA_PATH"])
    def test_a_runtime_alone_is_no_toolkit(
        self, name: str, toolkit: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv(name, str(toolkit))
        assert cuda_home() == str(toolkit)
        (toolkit / "bin" / "nvcc").unlink()
        assert find_cuda() == (None, f"{name}: {toolkit} has no bin/nvcc")

    def test_the_build_looks_for_cuda_only_where_it_can_use_it(
        self, toolkit: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("CUDA_HOME", str(toolkit))
        gpu = dataclasses.replace(RECIPE, cuda="13.0", gpu_operations="NCCL")
        own = dataclasses.replace(RECIPE, flags={"HOROVOD_GPU_ALLREDUCE": "NCCL"})
        for recipe in (gpu, own):
            assert recipe.uses_cuda()
            assert recipe.variables()["CUDA_HOME"] == str(toolkit)
            assert WITHOUT_CUDA not in recipe.variables()
        assert WITHOUT_CUDA in RECIPE.variables()
        (toolkit / "bin" / "nvcc").unlink()
        assert WITHOUT_CUDA in dataclasses.replace(RECIPE, cuda="13.0").variables()

    def test_gpus_asked_for_without_a_compiler_are_an_error_that_says_where_it_looked(
        self, toolkit: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("CUDA_HOME", str(toolkit))
        (toolkit / "bin" / "nvcc").unlink()
        with pytest.raises(HorovodBuildError, match=f"{toolkit} has no bin/nvcc"):
            wheel.require_build_tools(dataclasses.replace(RECIPE, gpu_operations="NCCL"), CXX)


class TestStandards:
    """Packages of the frameworks' names that say what they are compiled with."""

    def write_frameworks(self, folder: Path, config: str, extension: str, flags: str) -> None:
        torch, cmake = folder / "torch", folder / "torch" / "share" / "cmake"
        (cmake / "Torch").mkdir(parents=True)
        (cmake / "Torch" / "TorchConfig.cmake").write_text(config)
        (torch / "utils").mkdir()
        (torch / "utils" / "__init__.py").write_text(f"cmake_prefix_path = {str(cmake)!r}\n")
        (torch / "utils" / "cpp_extension.py").write_text(extension)
        (torch / "__init__.py").write_text(
            "from torch import utils\nfrom types import SimpleNamespace\n__version__ = '3.0'\n"
            "version = SimpleNamespace(cuda=None)\ndef compiled_with_cxx11_abi(): return True\n"
        )
        (folder / "tensorflow.py").write_text(
            "from types import SimpleNamespace\n__version__ = '3.0'\n"
            f"sysconfig = SimpleNamespace(get_compile_flags=lambda: {flags.split()!r})\n"
        )

    @pytest.mark.parametrize(
        ("config", "extension", "flags", "expected"),
        [
            ("    CXX_STANDARD 20\n", "['-std=c++20']", "--std=c++17", (20, 17)),
            ("    CXX_STANDARD 17\n", "['-std=c++17']", "--std=c++20 -DX", (17, 20)),
            ("    CXX_STANDARD 17\n", "['-std=c++23']", "-I/x/-std=c++26", (23, 17)),
            ("    CXX_STANDARD 23\n", "", "", (23, 17)),
            ("", "", "--std=c++14", (17, 17)),
        ],
    )
    def test_each_framework_says_its_own(
        self,
        config: str,
        extension: str,
        flags: str,
        expected: tuple[int, int],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        self.write_frameworks(tmp_path, config, extension, flags)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        cxx = toolchain_facts(RECIPE)["cxx"]
        assert (cxx["torch"], cxx["tensorflow"]) == expected

    def test_the_build_is_told_each(self) -> None:
        environ = wheel.build_environment(RECIPE, {"torch": 20, "tensorflow": 17})
        told = {name: environ[variable] for name, variable in CXX_VARIABLES.items()}
        assert told == {"torch": "20", "tensorflow": "17"}
        assert all(name in added_by("cxx-standards") for name in CXX_VARIABLES.values())

    def test_an_old_compiler_is_an_error_that_names_the_framework(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        old = tmp_path / "c++"
        old.write_text('#!/bin/sh\ncase "$*" in *c++20*) echo no such standard; exit 1;; esac\n')
        old.chmod(0o755)
        monkeypatch.setenv("CXX", str(old))
        wheel.require_build_tools(RECIPE, {"torch": 17, "tensorflow": 17})
        with pytest.raises(
            HorovodBuildError, match=r"no such standard.*Horovod for torch.*C\+\+20"
        ):
            wheel.require_build_tools(RECIPE, {"torch": 20, "tensorflow": 17})


class TestStatus:
    @pytest.fixture
    def package(self, tmp_path: Path) -> Path:
        """Make a horovod package that was built for RECIPE."""
        metadata = {"pytorch": "2.13.0", "tensorflow": "2.21.0", "dummy": "none"}
        (tmp_path / "metadata.json").write_text(json.dumps(metadata))
        (tmp_path / RECORD_NAME).write_text(json.dumps(dataclasses.asdict(RECIPE)))
        return tmp_path

    def test_missing(self) -> None:
        status = installed_status(RECIPE, None)
        assert status.state == "missing"
        assert not status.fits

    def test_ready(self, package: Path) -> None:
        status = installed_status(RECIPE, package)
        assert status.state == "ready"
        assert status.fits

    def test_one_framework_less_than_it_was_built_for_is_fine(self, package: Path) -> None:
        fewer = dataclasses.replace(RECIPE, frameworks={"torch": "2.13.0"})
        assert installed_status(fewer, package).state == "ready"

    def test_another_version_is_stale_and_both_are_named(self, package: Path) -> None:
        newer = dataclasses.replace(RECIPE, frameworks={"torch": "2.14.0"})
        status = installed_status(newer, package)
        assert status.state == "stale"
        assert not status.fits
        assert "2.13.0" in status.text
        assert "2.14.0" in status.text

    def test_a_framework_that_came_later_is_stale(self, package: Path) -> None:
        (package / "metadata.json").write_text(json.dumps({"pytorch": "2.13.0"}))
        status = installed_status(RECIPE, package)
        assert status.state == "stale"
        assert "without tensorflow" in status.text

    def test_one_built_by_another_tool_is_foreign(self, package: Path) -> None:
        (package / RECORD_NAME).unlink()
        status = installed_status(RECIPE, package)
        assert status.state == "foreign"
        assert status.fits

    @pytest.mark.parametrize(
        "change",
        [
            {"horovod": "0.29.0"},
            {"edits": "e2"},
            {"cuda": "12.8"},
            {"python": "cpython-312"},
            {"gpu_operations": "NCCL"},
            {"flags": {"HOROVOD_CPU_OPERATIONS": "CCL"}},
        ],
        ids=str,
    )
    def test_a_build_that_would_differ_is_stale(
        self, package: Path, change: dict[str, object]
    ) -> None:
        changed = dataclasses.replace(RECIPE, **change)  # type: ignore[arg-type]
        assert installed_status(changed, package).state == "stale"

    def test_flags_that_were_set_for_the_build_alone_stay_good(self, package: Path) -> None:
        flags = {"HOROVOD_GPU_OPERATIONS": "NCCL", "HOROVOD_NCCL_HOME": "/nccl"}
        built = dataclasses.replace(RECIPE, gpu_operations="NCCL", flags=flags)
        (package / RECORD_NAME).write_text(json.dumps(dataclasses.asdict(built)))
        assert installed_status(RECIPE, package).state == "ready"

    def test_a_cpu_build_by_choice_stays_good_when_cuda_is_there(self, package: Path) -> None:
        built = dataclasses.replace(RECIPE, flags={"HOROVOD_GPU_OPERATIONS": ""})
        (package / RECORD_NAME).write_text(json.dumps(dataclasses.asdict(built)))
        later = dataclasses.replace(RECIPE, gpu_operations="NCCL")
        assert installed_status(later, package).state == "ready"

    def test_a_damaged_metadata_file_is_stale(self, package: Path) -> None:
        (package / "metadata.json").write_text("{")
        assert installed_status(RECIPE, package).state == "stale"


class TestFirstError:
    def test_the_compilers_error_comes_before_everything_after_it(self) -> None:
        log = "\n".join(
            [
                "[ 10%] Building CXX object a.o",
                "a.cc: In function 'int f()':",
                "a.cc:7:3: error: 'nope' was not declared in this scope",
                "    7 |   nope();",
                "b.cc:1:1: error: second",
                "make[2]: *** [a.o] Error 1",
                "error: subprocess-exited-with-error",
                "RuntimeError: CMake failed",
            ]
        )
        text = wheel.first_error(log)
        assert text.startswith("  [ 10%]")
        assert "In function" in text
        assert "'nope' was not declared" in text
        assert "RuntimeError" not in text

    def test_a_cmake_error_is_found(self) -> None:
        log = "noise\n" * 50 + "CMake Error at x.cmake:3 (message):\n  no such thing\n" + "z\n" * 50
        assert "no such thing" in wheel.first_error(log)

    def test_running_out_of_memory_is_explained(self) -> None:
        log = "c++: fatal error: Killed signal terminated program cc1plus\ncompilation terminated."
        assert "MAKEFLAGS=-j1" in wheel.first_error(log)

    def test_without_any_error_line_the_end_is_shown(self) -> None:
        log = "\n".join(f"line {n}" for n in range(100))
        assert wheel.first_error(log).splitlines()[-1] == "  line 99"


class TestWheel:
    @pytest.mark.parametrize(
        ("given", "expected"),
        [("-j1", "-j1"), ("", None), ("w", None), (" -j8 --jobserver-auth=3,4", None)],
    )
    def test_the_users_makeflags_are_respected(
        self, given: str, expected: str | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cores = f"-j{wheel._cores()}"
        monkeypatch.setenv("MAKEFLAGS", given)
        assert wheel.build_environment(RECIPE, CXX)["MAKEFLAGS"] == (expected or cores)

    def test_every_missing_tool_is_named_before_anything_starts(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))
        for name in ("CXX", "HOROVOD_CMAKE"):
            monkeypatch.delenv(name, raising=False)
        with pytest.raises(HorovodBuildError) as caught:
            wheel.require_build_tools(RECIPE, CXX)
        assert "no C++ compiler was found" in str(caught.value)
        assert "cmake was not found" in str(caught.value)
        assert "apt install" in str(caught.value)

    def test_a_failing_build_shows_the_error_and_the_log(self, tmp_path: Path) -> None:
        source = tmp_path / "source"
        source.mkdir()
        (source / "setup.py").write_text(
            "print('a.cc:7:3: error: no such type'); raise SystemExit(3)"
        )
        log = tmp_path / "build.log"
        said: list[str] = []
        with pytest.raises(HorovodBuildError) as caught:
            wheel.compile_wheel(RECIPE, CXX, source, log, said.append)
        assert "a.cc:7:3: error: no such type" in str(caught.value)
        assert str(log) in str(caught.value)
        assert "about" in said[0]

    def test_the_cache_gives_back_what_was_stored(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(install, "cache_folder", lambda: tmp_path / "cache")
        made = tmp_path / "horovod-0.28.1-py3-none-any.whl"
        made.write_bytes(b"wheel")
        assert install.cached_wheel("key") is None
        stored = install.store_wheel(made, "key")
        assert install.cached_wheel("key") == stored
        assert install.cached_wheel("other") is None
        assert stored.read_bytes() == b"wheel"
        assert [path.name for path in stored.parent.iterdir()] == [made.name]

    def test_a_half_written_wheel_is_never_found(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(install, "cache_folder", lambda: tmp_path / "cache")

        def interrupted(source: Path, folder: str) -> str:
            target = Path(folder) / Path(source).name
            target.write_bytes(b"ha")
            raise KeyboardInterrupt

        monkeypatch.setattr("shutil.copy", interrupted)
        with pytest.raises(KeyboardInterrupt):
            install.store_wheel(tmp_path / "horovod-0.28.1-py3-none-any.whl", "key")
        assert install.cached_wheel("key") is None


class TestVerify:
    """A Horovod that does not work is a package of that name that misbehaves."""

    def write_horovod(self, folder: Path, code: str) -> Path:
        (folder / "horovod").mkdir()
        (folder / "horovod" / "__init__.py").write_text(code)
        return folder

    def test_one_that_fails_is_an_error_with_its_words(self, tmp_path: Path) -> None:
        folder = self.write_horovod(tmp_path, "raise ImportError('libtorch is not for you')")
        with pytest.raises(HorovodBuildError, match=r"with torch failed(.|\n)*not for you"):
            verify_allreduce(["torch"], folder=folder)

    def test_one_that_hangs_is_ended_with_all_its_processes(self, tmp_path: Path) -> None:
        code = (
            "import os, pathlib, subprocess, sys\n"
            "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
            f"pids = pathlib.Path({str(tmp_path / 'pids')!r})\n"
            "pids.write_text(f'{os.getpid()} {child.pid}')\n"
            "child.wait()\n"
        )
        folder = self.write_horovod(tmp_path, code)
        with pytest.raises(HorovodBuildError, match="no answer in 5 s"):
            verify_allreduce(["torch"], folder=folder, timeout=5)
        pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
        left = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
        _, alive = psutil.wait_procs(left, timeout=processes.LEAVING_SECONDS)
        assert len(pids) == 2
        assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]

    def test_a_wheel_that_fails_is_neither_cached_nor_installed(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made = tmp_path / "horovod-0.28.1-py3-none-any.whl"
        with zipfile.ZipFile(made, "w") as packed:
            packed.writestr("horovod/__init__.py", "raise ImportError('broken')")
        monkeypatch.setattr(install, "cache_folder", lambda: tmp_path / "cache")
        monkeypatch.setattr(install, "make_wheel", lambda *_, **__: made)
        monkeypatch.setattr(install, "toolchain_facts", lambda _: TOOLCHAIN)
        target = tmp_path / "target"
        with pytest.raises(HorovodBuildError, match="broken"):
            install.build_horovod(force=True, target=target, say=lambda _: None)
        assert not target.exists()
        assert not list((tmp_path / "cache").rglob("*.whl"))
