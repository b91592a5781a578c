"""Checkpoints are there in full or not at all, on a path and behind URLs."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry

from horovodrunner.errors import ConfigurationError
from horovodrunner.flows.checkpoints.manifest import Manifest
from horovodrunner.flows.checkpoints.store import CheckpointStore
from horovodrunner.flows.checkpoints.tree import pieces_of_tree
from horovodrunner.storage import is_url
from horovodrunner.wire.upload import Piece
from tests import processes

CONTENT = {"model.pt": b"weights" * 1000, "variables/deep/index": b"", "optimizer.pt": b"\0" * 99}


@pytest.fixture(params=["path", "file", "memory"])
def location(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "path":
        yield str(tmp_path / "runs" / "one")
    elif request.param == "file":
        yield f"file://{tmp_path}/runs/one"
    else:
        root = f"/{uuid.uuid4().hex}"
        yield f"memory:/{root}/one"
        memory = fsspec.filesystem("memory")
        if memory.exists(root):
            memory.rm(root, recursive=True)


def raw(location: str) -> tuple[Any, str]:
    """Reach the stored files without the store."""
    fs, root = fsspec.core.url_to_fs(location)
    return fs, str(root)


def tree(location: str) -> set[str]:
    """List all files there, relative to the location."""
    fs, root = raw(location)
    return {name.removeprefix(root + "/") for name in fs.find(root)}


def tamper(location: str, path: str, content: bytes | None) -> None:
    """Write a file behind the store's back, or delete it."""
    fs, root = raw(location)
    target = f"{root}/{path}"
    if content is None:
        fs.rm(target)
    else:
        fs.makedirs(target.rpartition("/")[0], exist_ok=True)
        fs.pipe(target, content)


def names(directory: str | Path) -> list[str]:
    """List a local directory, hidden entries too."""
    return sorted(entry.name for entry in Path(directory).iterdir())


def pieces(*files: Piece, hashes: dict[str, str] | None = None) -> Iterator[Piece]:
    """Files as they come from a task, with their hashes at the end."""
    yield from files
    known = {each.name: "0" * 64 for each in files if not each.name.endswith("/")}
    content = json.dumps(hashes or known).encode()
    yield Piece("manifest.json", len(content), [content])


def save(store: CheckpointStore, step: int, content: dict[str, bytes] | None = None) -> Manifest:
    content = content or CONTENT
    files = [
        Piece(path, len(data), [data[:3], memoryview(data)[3:]]) for path, data in content.items()
    ]
    hashes = {path: hashlib.sha256(data).hexdigest() for path, data in content.items()}
    return store.put_pieces(step, pieces(*files, hashes=hashes))


def latest(store: CheckpointStore) -> Manifest | None:
    found, damaged = store.find_latest()
    assert damaged == []
    return found


def steps(store: CheckpointStore) -> list[int]:
    return [manifest.step for manifest in store.manifests()]


def read(store: CheckpointStore, manifest: Manifest) -> dict[str, bytes]:
    return {piece.name: piece.read() for piece in store.pieces(manifest)}


def test_what_was_saved_is_found_and_read_back(location: str) -> None:
    store = CheckpointStore(location, keep=3)
    assert store.manifests() == []
    assert latest(store) is None
    saved = save(store, 7)
    again = CheckpointStore(location, keep=3)
    found = latest(again)
    assert found == saved
    assert (saved.step, saved.sequence, saved.size) == (7, 1, 7099)
    assert read(again, saved) == CONTENT
    assert tree(location) == {f"step-00000007/{path}" for path in [*CONTENT, "manifest.json"]}
    assert store.path_of(7) == f"{location}/step-00000007"
    assert is_url(location) == is_url(store.path_of(7))


def test_of_what_is_interrupted_nothing_is_left(location: str) -> None:
    store = CheckpointStore(location, keep=3)
    save(store, 1)
    before = tree(location)

    def interrupted() -> Iterator[bytes]:
        yield b"x"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.put_pieces(3, pieces(Piece("a/b", 1, [b"x"]), Piece("a/c", 2, interrupted())))
    assert tree(location) == before
    assert steps(store) == [1]
    if not is_url(location):
        assert names(location) == ["step-00000001"]


def test_content_that_fails_in_the_middle_leaves_only_older_ones(location: str) -> None:
    def chunks() -> Iterator[bytes]:
        yield b"x" * 10_000_000
        raise ConnectionResetError("the rank died")

    store = CheckpointStore(location, keep=3)
    save(store, 1)
    before = tree(location)
    with pytest.raises(ConnectionResetError):
        store.put_pieces(2, pieces(Piece("fine", 1, [b"x"]), Piece("model.pt", 9**9, chunks())))
    assert tree(location) == before
    assert steps(store) == [1]


FULL_DISK = """
import resource, signal, sys
from horovodrunner.flows.checkpoints.store import CheckpointStore
from horovodrunner.wire.upload import Piece
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
store = CheckpointStore(sys.argv[1], keep=3)
big = Piece("big", 1_200_000, (b"y" * 300_000 for _ in range(4)))
try:
    store.put_pieces(int(sys.argv[2]), [Piece("small", 1000, [b"x" * 1000]), big])
except OSError as error:
    print(type(error).__name__, error.errno, error.filename)
"""


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("location", ["path", "file"], indirect=True)
def test_a_disk_that_takes_no_more_leaves_only_older_ones(location: str, step: int) -> None:
    store = CheckpointStore(location, keep=3)
    save(store, 0)
    save(store, 1)
    before = tree(location)
    command = [sys.executable, "-c", FULL_DISK, location, str(step)]
    done = processes.run(command, capture_output=True)
    assert done.stdout.split()[:2] == ["OSError", "27"], done.stderr
    assert location in done.stdout  # whose disk it is
    # behind a URL the step that is saved again is overwritten in place
    lost = {path for path in before if path.startswith("step-00000001") and step == 1}
    assert tree(location) == (before - lost if is_url(location) else before)
    assert latest(CheckpointStore(location, keep=3)) == store.manifests()[0]
    if not is_url(location):
        assert names(location) == ["step-00000000", "step-00000001"]


def test_what_the_file_system_refuses_leaves_only_older_ones() -> None:
    location = f"memory://{uuid.uuid4().hex}"
    store = CheckpointStore(location, keep=3)
    save(store, 1)
    before = tree(location)

    def in_the_way() -> Iterator[bytes]:
        tamper(location, "step-00000002/variables", b"a file where a directory must be")
        yield b"x"

    with pytest.raises(OSError, match="variables"):
        store.put_pieces(
            2, pieces(Piece("a", 1, in_the_way()), Piece("variables/index", 1, [b"x"]))
        )
    assert tree(location) == before
    fsspec.filesystem("memory").rm(location, recursive=True)


@pytest.mark.parametrize("lost", ["all", "part"])
@pytest.mark.parametrize("step", [1, 2])
def test_files_lost_before_the_commit_are_noticed(tmp_path: Path, step: int, lost: str) -> None:
    store = CheckpointStore(tmp_path, keep=3)
    first = save(store, 1)

    def losing() -> Iterator[bytes]:
        target = next(tmp_path.glob(".incoming-*/b"))
        if lost == "all":
            target.unlink()
        else:
            os.truncate(target, 1)
        yield b"x"

    with pytest.raises(OSError, match="b'"):
        store.put_pieces(step, pieces(Piece("b", 3, [b"xyz"]), Piece("c", 1, losing())))
    assert names(tmp_path) == ["step-00000001"]
    assert store.verify(first) == ""


def test_a_location_that_becomes_a_file_is_an_os_error(tmp_path: Path) -> None:
    location = tmp_path / "runs"
    store = CheckpointStore(location, keep=3)

    def becoming() -> Iterator[bytes]:
        location.rename(tmp_path / "elsewhere")
        location.write_text("in the way")
        yield b"x"

    with pytest.raises(NotADirectoryError):
        store.put_pieces(1, pieces(Piece("a", 1, becoming())))
    with pytest.raises(OSError, match="runs"):
        save(store, 1)
    with pytest.raises(NotADirectoryError):
        store.find_latest()
    store.prune()


def test_a_location_that_vanished_is_made_anew(location: str) -> None:
    store = CheckpointStore(location, keep=3)
    save(store, 1)
    fs, root = raw(location)
    fs.rm(root, recursive=True)
    assert save(store, 2).sequence == 1
    assert steps(store) == [2]


def test_a_step_saved_again_replaces_its_own_and_is_the_newest(location: str) -> None:
    store = CheckpointStore(location, keep=5)
    save(store, 1, {"old": b"old", "both": b"1"})
    save(store, 2)
    again = save(store, 1, {"both": b"2"})
    assert [(m.step, m.sequence) for m in store.manifests()] == [(1, 3), (2, 2)]
    assert latest(store) == again
    assert read(store, again) == {"both": b"2"}
    assert "step-00000001/old" not in tree(location)
    if not is_url(location):
        assert names(location) == ["step-00000001", "step-00000002"]


def test_what_was_there_comes_back_when_it_cannot_be_replaced(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=5)
    first = save(store, 1)
    with pytest.raises(FileNotFoundError):
        store._storage.finish(".incoming-gone", "step-00000001")
    assert names(tmp_path) == ["step-00000001"]
    assert latest(store) == first


def test_a_crash_between_the_two_renames_loses_nothing(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    first = save(store, 1)
    aside = tmp_path / ".replaced-step-00000001-00c0ffee"
    (tmp_path / "step-00000001").rename(aside)
    os.utime(aside, (0, 0))
    store.prune()
    assert latest(store) == first
    assert not aside.exists()


def test_the_last_saved_are_kept_whatever_their_step(location: str) -> None:
    store = CheckpointStore(location, keep=2)
    for step in (10, 20, 3, 4):
        save(store, step)
    assert steps(store) == [4, 3]
    assert {path.split("/")[0] for path in tree(location)} == {"step-00000003", "step-00000004"}


def test_what_is_held_is_not_pruned(location: str) -> None:
    store = CheckpointStore(location, keep=1)
    held = save(store, 1)
    assert latest(store) == held
    save(store, 2)
    save(store, 3)
    assert steps(store) == [3, 1]
    assert read(store, held) == CONTENT
    again = latest(store)
    assert again is not None
    assert again.step == 3
    store.prune()
    assert steps(store) == [3]


def test_other_things_in_the_location_are_left_alone(location: str) -> None:
    store = CheckpointStore(location, keep=1)
    save(store, 1)
    others = {
        "notes.txt": b"mine",
        "step-00000009/no-manifest": b"incomplete",
        "step-9/manifest.json": b"not a checkpoint's name",
        "step-00000008": b"a file",
    }
    for path, content in others.items():
        tamper(location, path, content)
    save(store, 2)
    assert steps(store) == [2]
    assert set(others) < tree(location)
    assert latest(store) == store.manifests()[0]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (CONTENT["model.pt"][:-1], "6999 bytes instead of 7000"),
        (CONTENT["model.pt"][:-1] + b"S", "SHA-256"),
        (None, "is missing"),
    ],
    ids=["truncated", "flipped", "missing"],
)
def test_a_damaged_file_is_told_and_the_one_before_is_used(
    location: str, content: bytes | None, words: str
) -> None:
    store = CheckpointStore(location, keep=3)
    sound, damaged = save(store, 8), save(store, 5)
    tamper(location, "step-00000005/model.pt", content)
    assert "model.pt" in store.verify(damaged)
    found, sentences = store.find_latest()
    assert found == sound
    (sentence,) = sentences
    assert f"{location}/step-00000005" in sentence
    assert "model.pt" in sentence
    assert words in sentence
    assert "damaged and skipped" in sentence


@pytest.mark.parametrize(
    ("manifest", "words"),
    [(b"{", "not JSON"), (b"\xff", "utf-8"), (b'{"format": 2}', "format is 2")],
)
def test_an_unreadable_manifest_is_told_and_the_one_before_is_used(
    location: str, manifest: bytes, words: str
) -> None:
    store = CheckpointStore(location, keep=3)
    sound, _ = save(store, 8), save(store, 9)
    tamper(location, "step-00000009/manifest.json", manifest)
    found, sentences = store.find_latest()
    assert found == sound
    assert steps(store) == [8]
    assert len(sentences) == 1
    assert f"{location}/step-00000009" in sentences[0]
    assert words in sentences[0]


def test_a_copied_checkpoint_is_not_taken_for_another_step(location: str) -> None:
    store = CheckpointStore(location, keep=3)
    save(store, 8)
    fs, root = raw(location)
    fs.copy(f"{root}/step-00000008", f"{root}/step-00000009", recursive=True)
    found, sentences = store.find_latest()
    assert found is not None
    assert found.step == 8
    assert "its step is 8" in sentences[0]


def test_when_all_are_damaged_none_is_found(location: str) -> None:
    store = CheckpointStore(location, keep=3)
    for step in (1, 2):
        save(store, step)
        tamper(location, f"step-{step:08d}/model.pt", None)
    found, sentences = store.find_latest()
    assert found is None
    assert ["00000002" in each for each in sentences] == [True, False]


def test_empty_directories_are_kept(location: str) -> None:
    store = CheckpointStore(location, keep=1)
    index = Piece("variables/index", 0, [])
    saved = store.put_pieces(1, pieces(Piece("assets/", 0, []), Piece("a/b/", 0, []), index))
    assert saved.directories == ("assets", "a/b")
    if not is_url(location):
        assert [each.is_dir() for each in Path(location, "step-00000001").glob("a*/*")] == [True]
    saved = store.put_pieces(1, pieces(Piece("assets/", 0, [])))
    assert latest(store) == saved


@pytest.mark.parametrize("path", ["../out", "/abs", "", "a/./b", "manifest.json/x", "a\\b"])
@pytest.mark.parametrize("end", ["", "/"])
def test_unsafe_names_are_refused(location: str, path: str, end: str) -> None:
    store = CheckpointStore(location, keep=1)
    with pytest.raises(ValueError, match="path"):
        store.put_pieces(1, pieces(Piece(path + end, 1, [b"x"])))
    assert tree(location) == set()


@pytest.mark.parametrize("names", [("a/b", "a/b/c"), ("a/b", "a"), ("d/", "d"), ("a/b", "a/b/")])
def test_one_name_is_not_used_twice(location: str, names: tuple[str, ...]) -> None:
    store = CheckpointStore(location, keep=1)
    with pytest.raises((ValueError, OSError)):
        store.put_pieces(1, pieces(*(Piece(name, 1, [b"x"]) for name in names)))
    assert tree(location) == set()


def test_a_tree_is_added_with_links_and_empty_directories(location: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "b" / "empty").mkdir(parents=True)
    (source / "b" / "c").write_bytes(b"c" * 9_000_000)
    (source / "a").write_bytes(b"")
    (source / "link").symlink_to(source / "a")
    (source / "b" / "linked").symlink_to(source / "b" / "empty")
    store = CheckpointStore(location, keep=1)
    manifest = store.put_pieces(1, pieces_of_tree(source))
    assert [file.path for file in manifest.files] == ["a", "b/c", "link"]
    assert manifest.directories == ("b/empty", "b/linked")
    assert read(store, manifest)["b/c"] == b"c" * 9_000_000
    assert store.verify(manifest) == ""


def test_a_file_of_the_manifests_name_is_refused_by_its_name(location: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    store = CheckpointStore(location, keep=3)
    with pytest.raises(ValueError, match=r"'manifest\.json' is taken"):
        store.put(1, tmp_path)
    assert not store.has_any()


def test_what_cannot_be_read_ends_a_tree(tmp_path: Path) -> None:
    def refused() -> str:
        with pytest.raises(OSError, match="Errno") as caught:
            CheckpointStore(tmp_path / "runs", keep=1).put(1, source)
        assert not (tmp_path / "runs").exists()
        return str(caught.value)

    source = tmp_path / "source"
    assert "No such file" in refused()
    source.mkdir()
    (source / "circle").symlink_to(source)
    text = refused()
    assert "source/circle'" in text
    assert "circle/circle" not in text
    (source / "circle").unlink()
    os.mkfifo(source / "pipe")
    assert "pipe" in refused()
    (source / "pipe").unlink()
    (source / "nowhere").symlink_to("gone")
    assert "nowhere" in refused()


def test_old_leftovers_are_deleted_and_young_ones_are_not(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    save(store, 1)
    left = [".incoming-step-00000002-0", ".replaced-step-00000001-0", ".incoming-young-0"]
    for name in [*left, ".mine"]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
        if "young" not in name:
            os.utime(tmp_path / name, (0, 0))
    store.prune()
    assert names(tmp_path) == [".incoming-young-0", ".mine", "step-00000001"]


def test_check_creates_the_location_and_leaves_it_empty(location: str) -> None:
    store = CheckpointStore(location, keep=1)
    store.check()
    store.check()
    fs, root = raw(location)
    assert fs.isdir(root)
    assert tree(location) == set()


@pytest.mark.parametrize("below", ["", "/a/b"])
def test_check_refuses_a_location_that_cannot_be_written(location: str, below: str) -> None:
    tamper(location, "file", b"")
    store = CheckpointStore(f"{location}/file{below}", keep=1)
    with pytest.raises(ConfigurationError, match="Choose a directory") as caught:
        store.check()
    assert f"{location}/file" in str(caught.value)
    assert isinstance(caught.value.__cause__, OSError)
    assert str(caught.value.__cause__) in str(caught.value)


def test_an_unknown_scheme_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"nope://bucket/x.*'nope'.*Protocol not known"):
        CheckpointStore("nope://bucket/x", keep=1)


def test_a_scheme_whose_package_is_missing_is_refused() -> None:
    fsspec.register_implementation("lacking", "no_such_package.FS", errtxt="Install no-such")
    with pytest.raises(ConfigurationError, match=r"lacking://x.*'lacking'.*Install no-such"):
        CheckpointStore("lacking://x", keep=1)


@pytest.mark.parametrize(
    ("location", "text"),
    [
        ("dbfs:/run/1", r"on Databricks write the path /dbfs/run/1; .*'instance': ..., 'token'"),
        ("dbfs:///run", "on Databricks write the path /dbfs/run;"),
        ("DBFS:/run", r"\(scheme 'dbfs'\): on Databricks write the path /dbfs/run;"),
        ("s3n://bucket/run", "write s3://bucket/run instead"),
        ("wasbs://c@a.blob.core.windows.net/run", "write abfss://CONTAINER@ACCOUNT.dfs.core"),
        ("viewfs://cluster/run", "write the hdfs:// URL"),
        ("runs:/17/model", "it is MLflow's: mlflow.artifacts.download_artifacts"),
        ("cosn://bucket/run", "install the package that knows it, here and on the executors"),
        ("file://node-7/run", "names the host 'node-7': three slashes .* file:///node-7/run"),
        (r"C:\run", "a path of Windows"),
        ("C:/run", "a path of Windows"),
        (r"\\server\run", "a path of Windows"),
        ("~no-such-user/run", "the directory ~no-such-user/run is unknown"),
    ],
)
def test_what_to_write_or_to_install_is_told_for_a_location(location: str, text: str) -> None:
    with pytest.raises(ConfigurationError, match=text) as caught:
        CheckpointStore(location, keep=1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("scheme", "package"),
    [("s3", "s3fs"), ("s3a", "s3fs"), ("gs", "gcsfs"), ("abfss", "adlfs"), ("abfs", "adlfs")],
)
def test_the_package_for_a_scheme_is_named(
    scheme: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(_registry, scheme, raising=False)  # another test's
    with pytest.raises(ConfigurationError, match=f"pip install {package}, here and on the executo"):
        CheckpointStore(f"{scheme}://bucket/run", keep=1)


def test_file_urls_mean_the_same_however_they_are_written(tmp_path: Path) -> None:
    for url in (f"file:{tmp_path}/a", f"FILE://{tmp_path}/a", f"file://localhost{tmp_path}/a"):
        CheckpointStore(url, keep=1).check()
    assert [each.name for each in tmp_path.iterdir()] == ["a"]


class OverQuota(MemoryFileSystem):  # type: ignore[misc]
    """Storage that answers with an error of its own, as many implementations do."""

    protocol = "overquota"

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        if "model.pt" in path and "w" in mode:
            raise LookupError("the account is over quota")
        return super()._open(path, mode, **options)

    def rm(self, path: str, recursive: bool = False, maxdepth: int | None = None) -> None:
        if recursive and self.exists(f"{path}/a"):
            raise LookupError("no more today")
        super().rm(path, recursive=recursive, maxdepth=maxdepth)


def test_errors_of_fsspec_implementations_are_os_errors() -> None:
    fsspec.register_implementation("overquota", OverQuota, clobber=True)
    store = CheckpointStore(f"overquota://{uuid.uuid4().hex}", keep=1)
    older = save(store, 1, {"a": b"a"})
    with pytest.raises(OSError, match=r"overquota://.*LookupError.*over quota"):
        save(store, 2)
    assert latest(store) == older
    fsspec.filesystem("overquota").rm(store.location, recursive=True)


def test_what_cannot_be_deleted_counts_no_more() -> None:
    fsspec.register_implementation("overquota", OverQuota, clobber=True)
    store = CheckpointStore(f"overquota://{uuid.uuid4().hex}", keep=2)
    save(store, 1, {"a": b"a"})
    save(store, 2, {"a": b"a"})
    CheckpointStore(store.location, keep=1).prune()
    assert steps(store) == [2]
    fsspec.filesystem("memory").store.clear()


def test_without_fsspec_urls_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(ConfigurationError, match=r"'s3'.*pip install fsspec"):
        CheckpointStore("s3://bucket/x", keep=1)
    save(CheckpointStore(tmp_path, keep=1), 1)


def test_urls_that_would_be_misread_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="pattern"):
        CheckpointStore("memory://run[1]", keep=1)
    with pytest.raises(ConfigurationError, match="path object"):
        CheckpointStore(Path("s3://bucket/x"), keep=1)


def test_one_slash_after_the_scheme_is_enough(tmp_path: Path) -> None:
    store = CheckpointStore(f"file:{tmp_path}/x/", keep=1)
    save(store, 1)
    assert (tmp_path / "x" / "step-00000001" / "manifest.json").is_file()
    assert store.path_of(1) == f"file:{tmp_path}/x/step-00000001"


def test_a_plain_path_is_made_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert CheckpointStore("runs", keep=1).location == f"{tmp_path}/runs"
    assert CheckpointStore(Path("~/runs"), keep=1).path_of(1) == (
        f"{tmp_path}/home/runs/step-00000001"
    )


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        ("s3://bucket", True),
        ("dbfs:/x", True),
        ("simplecache::s3://bucket", True),
        ("/a:b", False),
        ("a/b:c", False),
        ("C:/x", False),
        ("12:30", False),
        (Path("/x"), False),
    ],
)
def test_urls_are_told_from_paths(location: str | Path, expected: bool) -> None:
    assert is_url(location) is expected


def test_everybody_may_read_what_umask_allows(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    save(store, 1)
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "step-00000001").stat().st_mode & 0o777 == 0o777 & ~umask
    assert json.loads((tmp_path / "step-00000001/manifest.json").read_text())["step"] == 1


def test_a_file_may_be_read_twice_at_once(location: str) -> None:
    store = CheckpointStore(location, keep=3)
    manifest = save(store, 1)
    first, second = store.pieces(manifest), store.pieces(manifest)
    begun = next(first)
    assert next(second).read() == CONTENT[begun.name]
    assert begun.read() == CONTENT[begun.name]
