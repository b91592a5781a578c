"""Ranges of a checkpoint's files, wherever they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from horovodrunner.flows.checkpoints.worker.source import DirectorySource, NearFirst, Range


class Recorded:
    """Files far away, and what of them was asked for."""

    def __init__(self, directory: Path) -> None:
        self._source = DirectorySource(directory)
        self.asked: list[Range] = []

    def files(self) -> Mapping[str, int]:
        return self._source.files()

    def content_of(self, path: str) -> str:
        return self._source.content_of(path)

    def read(self, ranges: Sequence[Range]) -> list[memoryview]:
        self.asked += ranges
        return self._source.read(ranges)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for path, text in (("rank-0/a", "aaaa"), ("rank-0/deep/b", "bbbb"), ("rank-1/a", "cdef")):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    return tmp_path


def test_a_directory_has_files_and_their_ranges(tree: Path) -> None:
    source = DirectorySource(tree)
    assert source.files() == {"rank-0/a": 4, "rank-0/deep/b": 4, "rank-1/a": 4}
    views = source.read([("rank-1/a", 1, 2), ("rank-0/deep/b", 0, 4), ("rank-1/a", 4, 0)])
    assert [bytes(view) for view in views] == [b"de", b"bbbb", b""]


def test_a_range_beyond_the_end_is_an_error(tree: Path) -> None:
    with pytest.raises(EOFError, match="rank-1/a ends at 4 bytes, 2 bytes early"):
        DirectorySource(tree).read([("rank-1/a", 3, 3)])


def test_what_is_near_is_not_asked_for_far_away(tree: Path, tmp_path: Path) -> None:
    near = tmp_path / "near"
    near.mkdir()
    (near / "a").write_text("near")
    far = Recorded(tree)
    ranges = [("rank-0/a", 0, 1), ("rank-1/a", 0, 2), ("rank-0/a", 2, 2), ("rank-1/a", 3, 1)]
    views = NearFirst(near, "rank-1/", far).read(ranges)
    assert [bytes(view) for view in views] == [b"a", b"ne", b"aa", b"r"]
    assert far.asked == [ranges[0], ranges[2]]
    nothing = Recorded(tree)
    NearFirst(near, "rank-1/", nothing).read(ranges[1:2])
    assert not nothing.asked
