"""Environments that are packed for executors: what the archive has, and what is refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import struct
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest

from horovodrunner import doctor
from horovodrunner.placement.packed import FILE, PackedEnvironment
from tests import processes
from tests.waiting import wait_until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="executors run on Linux")

ROOT = Path(__file__).resolve().parents[2]
BASE = Path(sys.base_prefix)
MINOR = f"{sys.version_info[0]}.{sys.version_info[1]}"
PACKAGES = f"lib/python{MINOR}/site-packages"


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """A virtual environment that has a module, and the names of what executors need."""
    path = tmp_path / "an-environment"
    processes.run([sys.executable, "-m", "venv", "--without-pip", path], check=True)
    for name in ("horovodrunner", "pyarrow", "cloudpickle", "torch"):
        distribution(path, name)
    (path / PACKAGES / "module.py").write_text("def name():\n    return __file__\n")
    program = path / "bin/program"
    program.write_text(f"#!{path}/bin/python\n")
    program.chmod(0o755)
    return path


def distribution(environment: Path, name: str) -> Path:
    info = environment / PACKAGES / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    return info


def pack(
    environment: Path, *options: str | Path, lent: str = sysconfig.get_path("purelib")
) -> processes.CompletedProcess[str]:
    """Pack it in a directory beside it; this package and venv-pack are lent to it."""
    out = environment.parent / "out"
    out.mkdir(exist_ok=True)
    command, variables = pack_command(environment, *options, lent=lent)
    return processes.run(command, cwd=out, env=variables, capture_output=True)


def pack_command(
    environment: Path, *options: str | Path, lent: str = sysconfig.get_path("purelib")
) -> tuple[list[str | Path], dict[str, str]]:
    python = environment / "bin/python"
    command: list[str | Path] = [python, "-m", "horovodrunner", "pack", *options]
    variables = {**os.environ, "PYTHONPATH": f"{ROOT}:{lent}", "PYTHONDONTWRITEBYTECODE": "1"}
    return command, variables


def packed(environment: Path, *options: str | Path) -> Path:
    """Return the only archive that was made."""
    done = pack(environment, *options)
    assert done.returncode == 0, done.stderr
    [archive] = (environment.parent / "out").iterdir()
    assert f"spark.archives={archive}#environment\n" in done.stdout
    assert "spark.pyspark.python=./environment/bin/python\n" in done.stdout
    assert f'spark.addArtifact("{archive}#environment", archive=True)\n' in done.stdout
    return archive


def unpacked(archive: Path) -> Path:
    target = archive.parent.parent / "elsewhere/environment"
    target.mkdir(parents=True)
    processes.run(["tar", "-C", target, "-xzf", archive], check=True)
    return target


def output_of(python: Path, program: str) -> str:
    command: list[str | Path] = [python, "-c", program]
    return processes.run(command, env={}, capture_output=True, check=True).stdout


@pytest.mark.heavy
def test_an_archive_has_all_that_it_needs_and_runs_anywhere(environment: Path) -> None:
    archive = packed(environment)
    shutil.rmtree(environment)
    there = unpacked(archive)
    program = """
import json, module, ssl, sqlite3, sys
files = [line.split()[-1] for line in open("/proc/self/maps")]
print(json.dumps([sys.prefix, sys.base_prefix, module.name(), sys.path, files]))
"""
    prefix, base, module, path, files = json.loads(output_of(there / "bin/python", program))
    assert (prefix, base) == (str(there), str(there))
    assert module == str(there / PACKAGES / "module.py")
    assert all(entry.startswith(str(there)) for entry in path if entry)
    assert not [file for file in files if file.startswith((f"{BASE}/", str(environment)))]
    assert (there / "bin/program").read_text() == "#!/usr/bin/env python\n"
    assert os.access(there / "bin/program", os.X_OK)
    told = PackedEnvironment.of_this_process(str(there))
    assert told is not None
    assert told.packages["torch"] == "1.0"
    assert told.digest[:12] in archive.name
    assert told.problem_here() == ""


@pytest.mark.heavy
def test_an_environment_of_condas_is_packed_by_conda_pack(environment: Path) -> None:
    conda = environment.with_name("conda")
    unpacked(packed(environment)).rename(conda)  # it has its own interpreter, as conda's have
    shutil.rmtree(environment.parent / "out")
    (conda / "conda-meta").mkdir()
    (conda / "conda-meta/history").touch()
    (conda / "bin/program").write_text(f"#!{conda}/bin/python\n")
    there = conda.with_name("there")
    there.mkdir()
    archive = packed(conda, "-o", "conda.tgz")
    processes.run(["tar", "-C", there, "-xzf", archive], check=True)
    shutil.rmtree(conda)
    program = "import module, sys; print(sys.base_prefix, module.name())"
    assert output_of(there / "bin/python", program) == f"{there} {there / PACKAGES / 'module.py'}\n"
    assert (there / "bin/program").read_text() == "#!/usr/bin/env python\n"
    assert (there / FILE).exists()


def test_the_same_content_is_the_same_archive_whenever_it_is_packed(environment: Path) -> None:
    first = packed(environment, "--python-prefix", "/usr")
    content = first.read_bytes()
    module = environment / PACKAGES / "module.py"
    first.unlink()
    os.utime(module, (1, 1))
    (environment / "bin/program").chmod(0o775)
    assert packed(environment, "--python-prefix", "/usr").read_bytes() == content
    assert "is there already" in pack(environment, "--python-prefix", "/usr").stdout
    # what is compiled while it is used does not make it another one
    output_of(environment / "bin/python", "import module")
    assert [*module.parent.glob("__pycache__/module.*")]
    assert packed(environment, "--python-prefix", "/usr") == first
    module.write_text("def name():\n    return 'changed'\n")
    assert pack(environment, "--python-prefix", "/usr").returncode == 0
    assert len([*first.parent.iterdir()]) == 2


def test_bytecode_is_packed_so_that_it_holds_good_anywhere(environment: Path) -> None:
    module = environment / PACKAGES / "module.py"
    stale = module.with_name("stale.py")
    stale.write_text("x = 1\n")
    output_of(environment / "bin/python", "import module, stale")
    stale.write_text("x = 2\n")  # as long as before
    os.utime(stale, (1, 1))
    made = packed(environment, "--python-prefix", sys.base_prefix)
    with tarfile.open(made) as archive:
        compiled = {Path(m.name).name.partition(".")[0]: m for m in archive if "pycache" in m.name}
        assert {*compiled} == {"module"}
        code = archive.extractfile(compiled["module"])
        assert code is not None
        assert struct.unpack("<I", code.read(8)[4:]) == (1,)  # by hash, and unchecked
        assert not [member for member in archive if member.mtime != 315532800 or member.uid]
    there = unpacked(made)
    os.utime(there / PACKAGES / "module.py", (7, 7))
    program = "import sys; sys.dont_write_bytecode = True; import module, stale; print(stale.x)"
    done = processes.run(
        [there / "bin/python", "-v", "-c", program], env={}, capture_output=True, check=True
    )
    assert done.stdout == "2\n"
    assert "module.cpython" in next(
        line
        for line in done.stderr.splitlines()
        if "code object from" in line and "module." in line
    )


def test_executors_own_python_can_be_named(environment: Path) -> None:
    there = unpacked(packed(environment, "--python-prefix", f"{BASE}/"))
    assert (there / "bin/python").readlink() == BASE / f"bin/python{MINOR}"
    assert f"home = {BASE}/bin\n" in (there / "pyvenv.cfg").read_text()
    program = "import module, sys; print(module.name(), sys.base_prefix)"
    module = there / PACKAGES / "module.py"
    assert output_of(there / "bin/python", program) == f"{module} {BASE}\n"


def test_links_within_the_environment_go_with_it(environment: Path) -> None:
    packages = environment / PACKAGES
    (packages / "absolute.py").symlink_to(packages / "module.py")
    (packages / "relative.py").symlink_to("module.py")
    os.link(packages / "module.py", packages / "hard.py")
    there = unpacked(packed(environment, "--python-prefix", str(BASE)))
    program = "import absolute, relative, hard; print(absolute.name, relative.name, hard.name)"
    assert output_of(there / "bin/python", program).count("function name") == 3
    assert (there / PACKAGES / "absolute.py").readlink() == Path("module.py")


def test_odd_things_in_an_environment_are_no_obstacle(environment: Path) -> None:
    packages = environment / PACKAGES
    Path(os.fsdecode(os.fsencode(packages) + b"/\xff.txt")).write_text("not in UTF-8\n")
    (packages / "a line\nand # another").touch()
    (packages / "broken").symlink_to("nowhere")
    (packages / "itself").symlink_to(environment)
    os.mkfifo(packages / "pipe")
    (distribution(environment, "cut-off") / "METADATA").write_bytes(b"\xff")
    (distribution(environment, "empty") / "METADATA").unlink()
    (distribution(environment, "other") / "direct_url.json").write_text("[1]")
    there = unpacked(packed(environment, "--python-prefix", str(BASE)))
    assert os.fsencode(there / PACKAGES) + b"/\xff.txt" in map(
        os.fsencode, (there / PACKAGES).iterdir()
    )
    assert (there / PACKAGES / "itself").resolve() == there
    told = PackedEnvironment.of_this_process(str(there))
    assert told is not None
    assert {"other", "torch"} < told.packages.keys()
    assert told.packages.keys().isdisjoint({"", "cut-off", "empty"})


def editable(environment: Path) -> None:
    info = distribution(environment, "My.Package")
    told = {"url": "file:///home/me/code", "dir_info": {"editable": True}}
    (info / "direct_url.json").write_text(json.dumps(told))


def developed(environment: Path) -> None:
    (environment / PACKAGES / "easy-install.pth").write_text("/home/me/code\n")


def not_isolated(environment: Path) -> None:
    config = environment / "pyvenv.cfg"
    text = config.read_text()
    config.write_text(text.replace("packages = false", "packages = true"))


def without_arrow(environment: Path) -> None:
    shutil.rmtree(environment / PACKAGES / "pyarrow-1.0.dist-info")


def linked(environment: Path) -> None:
    (environment / PACKAGES / "cached.py").symlink_to("/home/me/.cache/cached.py")


def nothing(environment: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("change", "options", "text"),
    [
        (editable, [], r"my-package (/home/me/code) is installed editable"),
        (developed, [], "Editable packages found: - /home/me/code"),
        (not_isolated, [], "also uses the packages of"),
        (without_arrow, [], "pyarrow is not installed in"),
        (linked, ["--python-prefix", "/usr"], "cached.py -> /home/me/.cache/cached.py"),
        (nothing, ["-o", "../an-environment/lib/x.tar.gz"], "is inside of the environment"),
        (nothing, ["-o", "archive.zip"], "let it end with .tar.gz"),
        (nothing, ["-o", "a#b.tar.gz"], "a#b.tar.gz has '#' in it, and Spark unpacks no archive"),
        (nothing, ["-o", "a b,c.tar.gz"], "has ' ' and ',' in it"),
        (nothing, ["-o", "a%20b.tar.gz"], "has '%' in it"),
        (nothing, ["-o", "nowhere/x.tar.gz"], "is no directory that this process may write to"),
        (nothing, ["--python-prefix", "usr"], "give an absolute path"),
    ],
)
def test_what_cannot_work_elsewhere_is_refused_and_nothing_is_left(
    environment: Path, change: object, options: list[str], text: str
) -> None:
    assert callable(change)
    change(environment)
    done = pack(environment, *options)
    assert done.returncode == 1
    assert text in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert [*(environment.parent / "out").iterdir()] == []


@pytest.mark.parametrize("name", ["my projects", "a,b", "100%", "a[1]"])
def test_a_directory_from_which_spark_unpacks_nothing_is_refused(
    environment: Path, name: str
) -> None:
    directory = environment.parent / name
    directory.mkdir()
    renamed = environment.rename(directory / "environment")  # pack() works beside it
    done = pack(renamed, "--python-prefix", str(BASE))
    assert done.returncode == 1
    assert "in it, and Spark unpacks no archive from such a path: choose another with -o" in (
        done.stderr
    )
    assert [*(directory / "out").iterdir()] == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_nothing_half_written(environment: Path, number: signal.Signals) -> None:
    out = environment.parent / "out"
    for count in range(300):
        (environment / PACKAGES / f"data-{count}.bin").write_bytes(os.urandom(200_000))
    out.mkdir()
    command, variables = pack_command(environment, "--python-prefix", str(BASE))
    with processes.started(command, cwd=out, env=variables, stderr=processes.PIPE) as process:
        wait_until(lambda: any(out.glob(".horovodrunner-pack-*/*")))
        process.send_signal(number)
        _, error = process.communicate()
    assert process.returncode == 128 + number
    assert error == "interrupted; nothing was changed\n"
    assert [*out.iterdir()] == []


def test_an_archive_that_was_there_stays_if_the_new_one_is_refused(environment: Path) -> None:
    archive = environment.parent / "x.tar.gz"
    archive.write_text("the old one")
    linked(environment)
    assert pack(environment, "-o", archive, "--python-prefix", "/usr").returncode == 1
    assert archive.read_text() == "the old one"


@pytest.mark.parametrize("options", [[], ["--python-prefix", str(BASE)]])
def test_without_room_nothing_is_left(environment: Path, options: list[str]) -> None:
    (environment / PACKAGES / "large.bin").write_bytes(bytes(2_000_000))
    out = environment.parent / "out"
    out.mkdir()
    command, variables = pack_command(environment, *options)
    limited = ["bash", "-c", 'ulimit -f 1000; exec "$@"', "-", *command]
    done = processes.run(limited, cwd=out, env=variables, capture_output=True)
    assert done.returncode == 1
    assert re.fullmatch("error: .* File too large.*\n", done.stderr), done.stderr
    assert [*out.iterdir()] == []


def test_without_venv_pack_the_command_that_installs_it_is_shown(environment: Path) -> None:
    lent = environment / PACKAGES
    for name in ("cloudpickle", "packaging", "platformdirs", "psutil", "tqdm"):
        shutil.copytree(Path(sysconfig.get_path("purelib")) / name, lent / name)
    done = pack(environment, "--python-prefix", "/usr", lent=str(lent))
    assert done.returncode == 1
    assert "bin/python -m pip install venv-pack`" in done.stderr


def test_the_systems_python_is_no_environment(tmp_path: Path) -> None:
    python = BASE / f"bin/python{MINOR}"
    variables = {**os.environ, "PYTHONPATH": f"{ROOT}:{sysconfig.get_path('purelib')}"}
    command: list[str | Path] = [python, "-m", "horovodrunner", "pack"]
    done = processes.run(command, cwd=tmp_path, env=variables, capture_output=True)
    assert done.returncode == 1
    assert "is no environment of its own" in done.stderr


def test_an_older_machine_is_told_what_the_environment_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = PackedEnvironment(MINOR, "x86_64", "2.999", "0" * 64, {})
    (tmp_path / FILE).write_bytes(new.to_bytes())
    assert PackedEnvironment.of_this_process(str(tmp_path)) == new
    assert "the packed environment needs glibc 2.999, and " in new.problem_here()
    assert PackedEnvironment(MINOR, "x86_64", "", "", {}).problem_here() == ""
    monkeypatch.setattr(PackedEnvironment, "of_this_process", lambda: new)
    [found] = doctor._packed()
    assert (found.verdict, found.text) == ("problem", new.problem_here())
    monkeypatch.undo()
    (tmp_path / FILE).write_text('{"other": 1}')
    assert PackedEnvironment.of_this_process(str(tmp_path)) is None
