"""Packs the environment in use into an archive for executors. Runs in: the command line.

venv-pack and conda-pack know what belongs to an environment and which paths in it to rewrite. What
they write is written anew here: without what differs from one machine or one day to the next, and
for a virtual environment with the interpreter, of which it has only a link.
"""

from __future__ import annotations

import contextlib
import fnmatch
import gzip
import hashlib
import importlib
import importlib.metadata
import importlib.util
import io
import json
import os
import platform
import posixpath
import re
import shutil
import struct
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from horovodrunner.errors import ConfigurationError
from horovodrunner.formatting import format_bytes, in_one_line
from horovodrunner.placement.packed import FILE, PackedEnvironment

__all__ = ["pack"]

NAME = "environment"
"""What the executors call the directory into which they unpack it."""

SUFFIXES = (".tar.gz", ".tgz")

NEEDED = ("horovodrunner", "pyarrow", "cloudpickle")
"""Distributions without which an executor can run nothing."""

_LEFT_OUT = ("test", "idlelib", "turtledemo", "ensurepip", "*-packages", "config-*")
"""In the directory of the standard library."""

_TIME = 315532800
"""The modification time of all files: 1980, the first one that zip archives can have."""

_UNSAFE = frozenset(' #%,*?[]{}^|<>`"\\')
"""Spark takes the path of an archive for a URL, and a list of them apart at commas."""

_DIGITS = 12
_LEVEL = 4
_GLIBC = re.compile(rb"\bGLIBC_2\.(\d+)(?:\.\d+)?\b")
_LONGEST_SYMBOL = 16

_PROBE = """
import json, site, sys
for name in ("ssl", "ctypes", "sqlite3", "zlib", "bz2", "lzma", "hashlib", "uuid"):
    try:
        __import__(name)
    except ImportError:
        pass
files = {line.split(None, 5)[5].strip() for line in open("/proc/self/maps") if "/" in line}
print(json.dumps([sys.prefix, site.getsitepackages()[0], sorted(files)]))
"""


def pack(
    output: str | None = None,
    python_prefix: str | None = None,
    say: Callable[[str], None] = print,
) -> Path:
    """Pack the environment of this process; `say` gets how to use the archive, by lines.

    `python_prefix` is where every executor has the Python of a virtual environment, which is left
    out then.
    """
    environment = _environment_in_use()
    _refuse_what_cannot_move(environment)
    target = _checked_output(output, environment)
    try:
        base = _Base.find(environment, python_prefix)
    except OSError as error:
        raise ConfigurationError(
            f"a copy of {sys.base_prefix} cannot be tried in {tempfile.gettempdir()}: "
            f"{in_one_line(error)}. Set TMPDIR to a directory with room, in which programs may run"
        ) from error
    directory = target if output is None else target.parent
    with _work_directory(directory) as work:
        staged = work / "staged.tar"
        _stage(environment, staged)
        written = work / "archive"
        try:
            packed, files = _write(staged, written, environment, base)
        except (OSError, tarfile.TarError) as error:
            raise ConfigurationError(
                f"{environment.prefix} cannot be packed: {in_one_line(error)}. If it is in use by "
                "something that changes it (pip, say), pack again when that has ended"
            ) from error
        if output is None:
            target = directory / f"{NAME}-{packed.digest[:_DIGITS]}.tar.gz"
        is_there = output is None and target.exists()
        if not is_there:
            written.replace(target)
    for line in _instructions(target, packed, files, is_there=is_there):
        say(line)
    return target


@dataclass(frozen=True)
class _Environment:
    prefix: str
    is_conda: bool
    distributions: Mapping[str, importlib.metadata.Distribution]

    @property
    def versions(self) -> dict[str, str]:
        return {name: each.version for name, each in sorted(self.distributions.items())}


def _environment_in_use() -> _Environment:
    if sys.platform != "linux":
        raise ConfigurationError(
            f"this is {platform.system()}, and executors run on Linux: pack on a machine, or in a "
            "container, like theirs"
        )
    is_conda = Path(sys.prefix, "conda-meta").is_dir()
    if not is_conda and sys.prefix == sys.base_prefix:
        raise ConfigurationError(
            f"{sys.executable} is no environment of its own, but the system's Python: make one "
            "(python3 -m venv environment), install there what main needs, and pack with its "
            "Python: environment/bin/python -m horovodrunner pack"
        )
    places = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    found = importlib.metadata.distributions(path=sorted(places))
    by_name = {_name_of(each): each for each in found}
    by_name.pop("", None)
    return _Environment(sys.prefix, is_conda, by_name)


def _name_of(distribution: importlib.metadata.Distribution) -> str:
    """Return a distribution's name; empty where it does not tell, as when pip was cut off."""
    with contextlib.suppress(UnicodeDecodeError):
        return _normalized(distribution.metadata["Name"] or "")
    return ""


def _normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _refuse_what_cannot_move(environment: _Environment) -> None:
    if editable := sorted(_editable(environment)):
        raise ConfigurationError(
            f"{', '.join(editable)} {'is' if len(editable) == 1 else 'are'} installed editable, "
            "from a directory that executors do not have: run `pip install --no-deps .` in it, "
            "which copies it into the environment, and pack again"
        )
    config = Path(environment.prefix, "pyvenv.cfg")
    if config.exists() and re.search(
        r"^include-system-site-packages\s*=\s*true", config.read_text(), re.MULTILINE | re.I
    ):
        raise ConfigurationError(
            f"{environment.prefix} also uses the packages of {sys.base_prefix}, which would not "
            "be packed: make an environment without --system-site-packages"
        )
    if missing := [name for name in NEEDED if name not in environment.distributions]:
        raise ConfigurationError(
            f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed in "
            f"{environment.prefix}, and no executor can do without: `{sys.executable} -m pip "
            f"install {' '.join(missing)}`"
        )


def _editable(environment: _Environment) -> Iterator[str]:
    """Yield what is installed as a reference to somewhere else, in any of the ways there are."""
    for name, each in environment.distributions.items():
        with contextlib.suppress(ValueError, AttributeError):  # not as it should be
            told = json.loads(each.read_text("direct_url.json") or "{}")
            if told.get("dir_info", {}).get("editable"):
                url = str(told.get("url", ""))
                yield f"{name} ({url.removeprefix('file://')})"
                continue
        if each.read_text("PKG-INFO") is not None and each.read_text("RECORD") is None:
            links = Path(sysconfig.get_path("purelib")).glob("*.egg-link")
            if name in {_normalized(link.stem) for link in links}:
                yield name


def _checked_output(output: str | None, environment: _Environment) -> Path:
    """Return the path of the archive, or the directory in which it is named by its content."""
    if output is None:
        target = directory = Path.cwd()
    else:
        target = Path(output).absolute()
        directory = target.parent
        if not output.endswith(SUFFIXES):
            raise ConfigurationError(
                f"-o {output}: Spark tells by the name how to unpack an archive; let it end with "
                ".tar.gz"
            )
        if target.is_dir():
            raise ConfigurationError(f"-o {output} is a directory: give the name of a file")
    if unsafe := sorted(_UNSAFE.intersection(str(target))):
        raise ConfigurationError(
            f"{target} has {' and '.join(map(repr, unsafe))} in it, and Spark unpacks no archive "
            "from such a path: choose another with -o"
        )
    if not directory.is_dir() or not os.access(directory, os.W_OK):
        raise ConfigurationError(
            f"{directory} is no directory that this process may write to: choose another with -o"
        )
    if directory.resolve().is_relative_to(Path(environment.prefix).resolve()):
        raise ConfigurationError(
            f"{directory} is inside of the environment that is packed, {environment.prefix}, and "
            "the archive would be in the next one: choose another directory with -o"
        )
    return target


@contextlib.contextmanager
def _work_directory(beside: Path) -> Iterator[Path]:
    """Make a directory on the archive's disk, also for what the packers keep for a while."""
    before = tempfile.tempdir
    with tempfile.TemporaryDirectory(prefix=".horovodrunner-pack-", dir=beside) as name:
        tempfile.tempdir = name
        try:
            yield Path(name)
        finally:
            tempfile.tempdir = before


def _stage(environment: _Environment, target: Path) -> None:
    """Let the packer of this kind of environment write all of it."""
    module = "conda_pack" if environment.is_conda else "venv_pack"
    try:
        packer = importlib.import_module(module)
    except ImportError as error:
        raise ConfigurationError(
            f"packing {environment.prefix} needs {module.replace('_', '-')}: `{sys.executable} -m "
            f"pip install {module.replace('_', '-')}`"
        ) from error
    known: Any = getattr(packer, "CondaPackException", None) or packer.core.VenvPackException
    try:
        packer.pack(prefix=environment.prefix, output=str(target), format="tar")
    except known as error:
        raise ConfigurationError(
            f"{module.replace('_', '-')} cannot pack {environment.prefix}: {_flat(str(error))}"
        ) from error
    except OSError as error:
        raise ConfigurationError(
            f"{environment.prefix} cannot be packed: {in_one_line(error)}"
        ) from error


def _flat(text: str) -> str:
    return " ".join(text.split())


@dataclass(frozen=True)
class _Base:
    """The Python of a virtual environment: files to take along, or where executors have it."""

    files: Mapping[str, str]
    """By their names in the archive."""
    program: bytes = b""
    site_packages: str = ""
    """Where it finds packages once it is no virtual environment's."""
    elsewhere: str = ""

    @classmethod
    def find(cls, environment: _Environment, python_prefix: str | None) -> _Base | None:
        if environment.is_conda:
            if python_prefix is not None:
                raise ConfigurationError(
                    f"--python-prefix {python_prefix}: {environment.prefix} is conda's, which has "
                    "its own Python in it: leave the option out"
                )
            return None
        if python_prefix is not None:
            if not python_prefix.startswith("/"):
                raise ConfigurationError(
                    f"--python-prefix {python_prefix}: give an absolute path, such as /usr, whose "
                    f"bin/python{_MINOR} every executor has"
                )
            return cls({}, elsewhere=python_prefix.rstrip("/") or "/")
        return _copied_base()


_MINOR = f"{sys.version_info[0]}.{sys.version_info[1]}"
_VENVS_PACKAGES = f"lib/python{_MINOR}/site-packages"


def _copied_base() -> _Base:
    """List what the interpreter consists of, once it was seen to run at another place."""
    stdlib, base = str(Path(os.__file__).parent), sys.base_prefix
    where = posixpath.relpath(stdlib, base).replace("lib64/", "lib/", 1)
    program = _program_of_anywhere(Path(sys.executable).resolve().read_bytes())
    files: dict[str, str] = {}
    library = Path(base, "lib", sysconfig.get_config_var("INSTSONAME") or "")
    if ".so" in library.name and library.is_file():
        files[f"lib/{library.name}"] = str(library)
    with tempfile.TemporaryDirectory(prefix="horovodrunner-") as place:
        site = _run_elsewhere(Path(place).resolve(), program, files, stdlib, where)
    headers = sysconfig.get_path("include", vars={"base": base, "installed_base": base})
    for top, name_there in ((stdlib, where), (headers, posixpath.relpath(headers, base))):
        for root, directories, names in os.walk(top):
            if root == stdlib:
                directories[:] = [each for each in directories if not _is_left_out(each)]
            there = posixpath.join(name_there, posixpath.relpath(root, top))
            files |= {posixpath.normpath(f"{there}/{each}"): f"{root}/{each}" for each in names}
    return _Base(files, program, site)


def _is_left_out(directory: str) -> bool:
    return any(fnmatch.fnmatchcase(directory, pattern) for pattern in _LEFT_OUT)


def _program_of_anywhere(program: bytes) -> bytes:
    """Let an interpreter look for its library beside itself, if it names the place where it is.

    The path in it gets shorter, as chrpath does it, so that nothing moves; that it runs is tried.
    """
    named = b"\0%s\0" % os.fsencode(f"{sys.base_prefix}/lib")
    beside = b"\0%s\0" % b"$ORIGIN/../lib".ljust(len(named) - 2, b"\0")
    return program.replace(named, beside) if len(named) == len(beside) else program


def _run_elsewhere(
    place: Path, program: bytes, files: Mapping[str, str], stdlib: str, where: str
) -> str:
    """Run a copy of the interpreter; return where it looks for packages, below its own prefix."""
    python = place / "bin" / f"python{_MINOR}"
    for path in (python, place / where, *(place / name for name in files)):
        path.parent.mkdir(parents=True, exist_ok=True)
    python.write_bytes(program)
    python.chmod(0o755)
    for name, source in files.items():
        shutil.copy(source, place / name)
    (place / where).symlink_to(stdlib)
    done = subprocess.run(
        [python, "-I", "-c", _PROBE], env={}, capture_output=True, text=True, check=False
    )
    problem = f"its copy ends with {_flat(done.stderr[-300:])}"
    if done.returncode == 0:
        prefix, site, mapped = json.loads(done.stdout.splitlines()[-1])
        problem = _what_it_needs(place, prefix, mapped, stdlib)
        if not problem:
            return posixpath.relpath(str(site), prefix)
    raise ConfigurationError(
        f"the Python of this environment ({sys.base_prefix}) cannot be taken along: {problem}. "
        f"Where every executor has a Python {_MINOR}, name its place (--python-prefix /usr for "
        f"/usr/bin/python{_MINOR}); or make the environment with `uv venv --managed-python`, or "
        "with conda, whose Pythons run anywhere"
    )


def _what_it_needs(place: Path, prefix: str, mapped: list[str], stdlib: str) -> str:
    if prefix != str(place):
        return f"wherever it is, it looks for its standard library in {prefix}"
    base = os.path.realpath(sys.base_prefix)
    inner = os.path.realpath(stdlib)
    for file in mapped:
        is_python = os.path.basename(file).startswith("libpython")  # noqa: PTH119
        is_of_base = base not in ("/usr", "/") and file.startswith(f"{base}/")
        if (is_python or is_of_base) and not file.startswith((f"{place}/", f"{inner}/")):
            return f"it needs {file}"
    return ""


class _Watched(io.RawIOBase):
    """Passes a file on, adds it to a digest, and notes which glibc it asks for."""

    def __init__(self, file: IO[bytes], digest: Any) -> None:
        self._file = file
        self._digest = digest
        self._end = b""
        self._is_elf: bool | None = None
        self.glibc = 0

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._digest.update(data)
        if self._is_elf is None:
            self._is_elf = data.startswith(b"\x7fELF")
        if self._is_elf and data:
            text = self._end + data
            self.glibc = max([self.glibc, *(int(each) for each in _GLIBC.findall(text))])
            self._end = text[-_LONGEST_SYMBOL:]
        return data


@dataclass(frozen=True)
class _Entry:
    """A file of the archive: its content, or where it links to."""

    name: str
    size: int = 0
    is_executable: bool = False
    changed: int = 0
    """When, in seconds since the epoch."""
    link: str = ""
    is_directory: bool = False
    open: Callable[[], IO[bytes]] = io.BytesIO


def _write(
    staged: Path, target: Path, environment: _Environment, base: _Base | None
) -> tuple[PackedEnvironment, int]:
    digest, glibc, files = hashlib.sha256(), 0, 0
    with (
        tarfile.open(staged) as source,
        target.open("wb") as raw,
        gzip.GzipFile("", "wb", _LEVEL, raw, mtime=0) as compressed,
        tarfile.open(fileobj=compressed, mode="w") as archive,
    ):
        entries = {entry.name: entry for entry in _entries(source, environment, base)}
        for name in sorted(entries):
            entry = entries[name]
            if name.endswith(".pyc"):
                if (code := _of_any_time(entry, entries)) is not None:
                    _add(archive, entry, io.BytesIO(code), len(code))
                continue  # what Python compiles as it goes does not make another environment
            told = f"\0{name}\0{entry.link}\0{entry.is_executable}\0"
            digest.update(told.encode(errors="surrogateescape"))  # names are any bytes
            with entry.open() as content:
                watched = _Watched(content, digest)
                _add(archive, entry, watched, entry.size)
            glibc, files = max(glibc, watched.glibc), files + 1
        packed = PackedEnvironment(
            python=platform.python_version(),
            machine=platform.machine(),
            glibc=f"2.{glibc}" if glibc else "",
            digest=digest.hexdigest(),
            packages=environment.versions,
        )
        about = packed.to_bytes()
        _add(archive, _Entry(FILE), io.BytesIO(about), len(about))
    return packed, files


def _add(archive: tarfile.TarFile, entry: _Entry, content: Any, size: int) -> None:
    info = tarfile.TarInfo(entry.name)
    info.mtime = _TIME
    info.mode = 0o755 if entry.is_executable or entry.is_directory else 0o644
    if entry.is_directory:
        info.type = tarfile.DIRTYPE
    elif entry.link:
        info.type, info.linkname, info.mode = tarfile.SYMTYPE, entry.link, 0o777
    else:
        info.size = size
    archive.addfile(info, content if info.isreg() else None)


def _entries(
    source: tarfile.TarFile, environment: _Environment, base: _Base | None
) -> Iterator[_Entry]:
    """Yield what the archive is to have, from what the packer wrote and from the interpreter."""
    outside: list[str] = []
    for member in source.getmembers():
        name = posixpath.normpath(member.name)
        if base is not None and _is_interpreters(name, member):
            continue
        if base is not None and base.site_packages:
            name = _moved(name, base.site_packages)
        if member.issym():
            link = _inner_link(name, member.linkname, environment.prefix)
            if link is None:
                outside.append(f"{name} -> {member.linkname}")
            yield _Entry(name, link=link or "?")
        elif member.isdir():
            yield _Entry(name, is_directory=True)
        elif member.isreg() or member.islnk():
            data = member
            while data.islnk():
                data = source.getmember(data.linkname)
            executable, changed = bool(data.mode & 0o100), int(data.mtime)
            yield _Entry(name, data.size, executable, changed, open=_opener(source, data))
    if outside:
        more = f" and {len(outside) - 3} more" if len(outside) > 3 else ""
        raise ConfigurationError(
            f"links lead out of the environment, to what executors do not have: "
            f"{', '.join(outside[:3])}{more}: install copies (uv: --link-mode copy)"
        )
    if base is not None:
        yield from _interpreter(base)


def _opener(source: tarfile.TarFile, member: tarfile.TarInfo) -> Callable[[], IO[bytes]]:
    def open_member() -> IO[bytes]:
        return source.extractfile(member) or io.BytesIO()

    return open_member


def _is_interpreters(name: str, member: tarfile.TarInfo) -> bool:
    is_program = re.fullmatch(r"bin/(python[\d.]*)", name) is not None
    return name == "pyvenv.cfg" or (is_program and (member.issym() or member.isreg()))


def _moved(name: str, site_packages: str) -> str:
    if name == _VENVS_PACKAGES or name.startswith(f"{_VENVS_PACKAGES}/"):
        return site_packages + name.removeprefix(_VENVS_PACKAGES)
    return name


def _inner_link(name: str, link: str, prefix: str) -> str | None:
    """Return a link as it is right wherever the environment is; None if it leads out of it."""
    if link.startswith("/"):
        if link != prefix and not link.startswith(f"{prefix}/"):
            return None
        inner = link.removeprefix(prefix).strip("/") or "."
        return posixpath.relpath(inner, posixpath.dirname(name) or ".")
    inner = posixpath.normpath(posixpath.join(posixpath.dirname(name), link))
    return None if inner.startswith("..") else link


def _interpreter(base: _Base) -> Iterator[_Entry]:
    names = ("python", "python3", f"python{_MINOR}")
    if base.elsewhere:
        python = posixpath.join(base.elsewhere, "bin", names[-1])
        yield from (_Entry(f"bin/{name}", link=python) for name in names)
        text = f"home = {posixpath.dirname(python)}\ninclude-system-site-packages = false\n"
        text += f"version = {platform.python_version()}\n"
        yield _Entry("pyvenv.cfg", len(text), open=lambda: io.BytesIO(text.encode()))
        return
    for name in names[:-1]:
        yield _Entry(f"bin/{name}", link=names[-1])
    program = base.program
    yield _Entry(f"bin/{names[-1]}", len(program), True, open=lambda: io.BytesIO(program))
    for name, path in base.files.items():
        status = Path(path).stat()
        executable, changed = bool(status.st_mode & 0o100), int(status.st_mtime)
        yield _Entry(name, status.st_size, executable, changed, open=_file_opener(path))


def _file_opener(path: str) -> Callable[[], IO[bytes]]:
    return lambda: Path(path).open("rb")


def _of_any_time(entry: _Entry, entries: Mapping[str, _Entry]) -> bytes | None:
    """Return bytecode that holds good whatever the source's time; None if it is not its source's.

    It has the hash of the source instead, which Python is told not to check (PEP 552).
    """
    directory, name = posixpath.split(entry.name)
    source = entries.get(f"{posixpath.dirname(directory)}/{name.partition('.')[0]}.py")
    with entry.open() as file:
        code = file.read()
    if source is None or len(code) < 16:
        return None
    with source.open() as file:
        digest = importlib.util.source_hash(file.read())
    times = struct.pack("<II", source.changed & 0xFFFFFFFF, source.size & 0xFFFFFFFF)
    if code[8:16] != (times if code[4:8] == bytes(4) else digest):
        return None
    return code[:4] + (1).to_bytes(4, "little") + digest + code[16:]


def _instructions(
    archive: Path, packed: PackedEnvironment, files: int, *, is_there: bool
) -> Iterator[str]:
    where = f"{archive}#{NAME}"
    python = f"./{NAME}/bin/python"
    frameworks = ("horovod", "torch", "tensorflow", "tensorflow-cpu", "keras", "jax")
    listed = [f"{each} {packed.packages[each]}" for each in frameworks if each in packed.packages]
    needs = f"Linux on {packed.machine}" + f" with glibc {packed.glibc}" * bool(packed.glibc)
    yield f"{archive}{' is there already, with the same content' * is_there}"
    yield f"  {format_bytes(archive.stat().st_size)}, {files} files, sha256 {packed.digest}"
    yield f"  Python {packed.python}, {', '.join(listed) or 'no framework'}; needs {needs} or newer"
    yield ""
    yield "for spark-submit (--conf) and spark-defaults.conf:"
    yield f"  spark.archives={where}"
    yield f"  spark.pyspark.python={python}"
    yield "in a notebook or a script, before the session is created:"
    yield f'  os.environ["PYSPARK_PYTHON"] = "{python}"'
    yield f'  SparkSession.builder.config("spark.archives", "{where}")'
    yield "over Spark Connect, in its session:"
    yield f'  spark.addArtifact("{where}", archive=True)'
    yield f'  spark.conf.set("spark.sql.execution.pyspark.python", "{python}")'
