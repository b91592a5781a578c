"""The code directory as one file: what travels, and what is refused."""

from __future__ import annotations

import io
import os
import socket
import tarfile
from pathlib import Path

import pytest

from horovodrunner import ConfigurationError
from horovodrunner.flows.script import packing
from horovodrunner.flows.script.packing import largest_entries, pack


def unpacked(archive: bytes, directory: Path) -> dict[str, str]:
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(directory, filter="fully_trusted")
    paths = sorted(directory.rglob("*"))
    assert not [path for path in paths if path.is_symlink()]
    return {
        str(path.relative_to(directory)): path.read_text() if path.is_file() else "/"
        for path in paths
    }


def write(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    directory = tmp_path / "code"
    directory.mkdir()
    return directory


def test_what_a_checkout_has_beside_its_code_stays_behind(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(root, "train.py", "pkg/a.py", "conf/a.yaml", ".env", "empty.txt", "tübingen.py")
    write(root, ".git/HEAD", "pkg/__pycache__/a.pyc", "node_modules/x.js", ".venv/x", ".idea/x")
    write(root, "env/pyvenv.cfg", "env/lib/x.py", "conda/conda-meta/history", "conda/x.py")
    write(root, "runs/1/record", "checkpoints/1/state")
    (root / "logs").mkdir()
    (root / "run.sh").write_text("run.sh")
    (root / "run.sh").chmod(0o755)
    os.mkfifo(root / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        monkeypatch.chdir(root)
        listener.bind("socket")  # its path is too long for some
        archive = pack(root, [str(root / "runs"), str(root / "pkg" / ".." / "checkpoints")])
    found = unpacked(archive, tmp_path / "copy")
    directories = {name for name, text in found.items() if text == "/"}
    assert directories == {"pkg", "conf", "logs"}
    files = {name: text for name, text in found.items() if text != "/"}
    wanted = {"train.py", "pkg/a.py", "conf/a.yaml", ".env", "empty.txt", "tübingen.py", "run.sh"}
    assert files == {name: name for name in wanted}
    assert os.access(tmp_path / "copy" / "run.sh", os.X_OK)


def test_what_links_lead_to_travels_in_their_place(root: Path, tmp_path: Path) -> None:
    write(root, "pkg/a.py")
    write(tmp_path, "shared/b.py", "single.py")
    (root / "again.py").symlink_to("pkg/a.py")
    (root / "shared").symlink_to(tmp_path / "shared")
    (root / "single.py").symlink_to(tmp_path / "single.py")
    (root / "hard.py").hardlink_to(root / "pkg" / "a.py")
    (root / "nowhere").symlink_to(root / "missing")
    (root / "itself").symlink_to("itself")
    (root / "pkg" / "up").symlink_to(root)
    found = unpacked(pack(root), tmp_path / "copy")
    assert {name: text for name, text in found.items() if text != "/"} == {
        "pkg/a.py": "pkg/a.py",
        "again.py": "pkg/a.py",
        "hard.py": "pkg/a.py",
        "shared/b.py": "shared/b.py",
        "single.py": "single.py",
    }


def test_too_much_is_refused_with_what_is_largest(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(root, "train.py", ".git/objects")
    for name in ("data/a.bin", "data/b.bin", "model.pt"):
        write(root, name)
        os.truncate(root / name, 40_000_000)
    os.truncate(root / ".git" / "objects", 200_000_000)
    with pytest.raises(ConfigurationError) as caught:
        pack(root)
    first = str(caught.value).splitlines()[0]
    assert "Largest: data/ (76.3 MiB), model.pt (38.1 MiB), train.py" in first
    assert "code_dir=" in first
    assert ".git" not in first
    monkeypatch.setattr(packing, "MAX_BYTES", 10**9)
    monkeypatch.setattr(packing, "MAX_FILES", 3)
    with pytest.raises(ConfigurationError, match="more than 3 files"):
        pack(root)


def test_what_is_largest_is_told_of_a_packed_one_too(root: Path) -> None:
    write(root, "train.py", "data/a", "data/b")
    assert largest_entries(pack(root)).startswith("data/ (12 bytes), train.py (8 bytes)")


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_what_cannot_be_read_is_named(
    kind: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(root, "train.py", "secret/key.pem")
    refused = root / "secret" / ("key.pem" if kind == "file" else "")
    # the superuser may read everything
    opened, listed = open, os.scandir

    def refuse(path: object) -> None:
        if os.path.realpath(str(path)) == str(refused):
            raise PermissionError(13, "Permission denied", str(path))

    def open_unless_refused(path: object, *args: object, **kwargs: object) -> object:
        refuse(path)
        return opened(path, *args, **kwargs)  # type: ignore[call-overload]

    def scandir_unless_refused(path: str) -> object:
        refuse(path)
        return listed(path)

    monkeypatch.setattr("builtins.open", open_unless_refused)
    monkeypatch.setattr(os, "scandir", scandir_unless_refused)
    with pytest.raises(ConfigurationError) as caught:
        pack(root)
    assert str(refused) in str(caught.value)
    assert "Permission denied" in str(caught.value)
    assert "code_dir=" in str(caught.value)
