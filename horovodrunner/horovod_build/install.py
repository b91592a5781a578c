"""Brings the right Horovod into this environment. Runs in: the command line."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path

import platformdirs

from horovodrunner.errors import HorovodBuildError
from horovodrunner.horovod_build.recipe import (
    Recipe,
    Status,
    cache_key,
    current_recipe,
    find_cuda,
    horovod_folder,
    installed_status,
    toolchain_facts,
)
from horovodrunner.horovod_build.sources import PIP, Say
from horovodrunner.horovod_build.verify import verify_allreduce
from horovodrunner.horovod_build.wheel import make_wheel, require_build_tools


def cache_folder() -> Path:
    """Return the folder that keeps finished wheels and build logs."""
    return Path(platformdirs.user_cache_dir("horovodrunner"))


def check_horovod() -> Status:
    """Return whether the installed Horovod fits the installed frameworks; importing neither."""
    return installed_status(current_recipe(), horovod_folder())


def build_horovod(*, force: bool = False, target: Path | None = None, say: Say = print) -> None:
    """Install a Horovod built for the installed frameworks, unless it is there already.

    Nothing is installed or cached before two processes have proved it with a real allreduce for
    every framework. `force` builds anew, whatever is installed or cached; `target` is a folder to
    install into instead of the environment.
    """
    recipe = current_recipe()
    if target is None and not force and _nothing_to_do(recipe, say):
        return
    say(f"looking at {recipe}, the compiler and the cache")
    facts = toolchain_facts(recipe)
    cxx = facts["cxx"]
    require_build_tools(recipe, cxx)
    home, lack = find_cuda()
    if recipe.cuda and home is None:
        say(
            f"note: torch has CUDA {recipe.cuda}, but its compiler is not here ({lack}), so this "
            "Horovod is for the CPU; for GPUs install the CUDA toolkit or set CUDA_HOME to it"
        )
    key = cache_key(recipe, facts)
    wheel = cached_wheel(key)
    if wheel is None or force:
        wheel = _make_cached_wheel(recipe, cxx, key, say)
    else:
        say(f"using the wheel built earlier: {wheel}")
        _prove(wheel, recipe, say)
    _install(wheel, target)
    say(f"installed Horovod {recipe.horovod} for {recipe}")


def cached_wheel(key: str) -> Path | None:
    return next((cache_folder() / "wheels" / key).glob("*.whl"), None)


def store_wheel(wheel: Path, key: str) -> Path:
    """Copy a wheel into the cache in one step, so that nobody ever sees half of it."""
    folder = cache_folder() / "wheels" / key
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix="incoming-") as incoming:
        copied = Path(shutil.copy(wheel, incoming))
        return copied.replace(folder / wheel.name)


def _nothing_to_do(recipe: Recipe, say: Say) -> bool:
    status = installed_status(recipe, horovod_folder())
    if status.state == "foreign":
        say(f"{status.text}; verifying it")
        verify_allreduce(recipe.frameworks)
    if status.fits:
        say(f"{status.text}: nothing to do")
        return True
    say(status.text)
    return False


def _make_cached_wheel(recipe: Recipe, cxx: Mapping[str, int], key: str, say: Say) -> Path:
    log = cache_folder() / "logs" / f"horovod-{key}.log"
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise HorovodBuildError(
            f"the cache folder {cache_folder()} cannot be written ({error.strerror}); "
            "set XDG_CACHE_HOME to a folder that can"
        ) from error
    with tempfile.TemporaryDirectory(prefix="horovod-build-", ignore_cleanup_errors=True) as work:
        made = make_wheel(recipe, cxx, Path(work), log, say)
        _prove(made, recipe, say)
        return store_wheel(made, key)


def _prove(wheel: Path, recipe: Recipe, say: Say) -> None:
    """Verify a wheel unpacked beside the environment, which stays as it is if that fails."""
    say(f"verifying with a two-process allreduce: {', '.join(recipe.frameworks)}")
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="horovod-prove-") as folder:
        with zipfile.ZipFile(wheel) as packed:
            packed.extractall(folder)
        verify_allreduce(recipe.frameworks, folder=Path(folder))
    say(f"  verified in {time.monotonic() - started:.0f} s")


def _install(wheel: Path, target: Path | None) -> None:
    # pip would leave an installed horovod of the same version alone without --force-reinstall.
    command = [*PIP, "install", "--no-deps", "--no-index", "--force-reinstall", str(wheel)]
    if target is not None:
        command += ["--target", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise HorovodBuildError(
            f"pip could not install {wheel} (exit code {done.returncode}):\n"
            f"  {done.stderr.strip()[-1000:]}"
        )
