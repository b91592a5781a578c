"""Parts of tensors in files, and tensors that are divided otherwise, in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from horovodrunner.errors import CheckpointError
from horovodrunner.flows.checkpoints.worker.source import DirectorySource

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.heavy

DTYPES = ("float32", "bfloat16", "float8_e4m3fn", "int64", "bool", "complex64")


def save(root: Path, rank: int, parts: list[tuple[Any, Any]]) -> None:
    from horovodrunner.flows.checkpoints.worker.shards import write_parts

    directory = root / f"rank-{rank}"
    directory.mkdir()
    write_parts(parts, directory)


def save_whole(root: Path, **tensors: Any) -> None:
    from horovodrunner.flows.checkpoints.worker.shards import parts_of

    save(root, 0, parts_of({"model": tensors}, {"model"}, {}))


def save_rows(root: Path, rank: int, whole: Any, first: int, last: int) -> None:
    """Save some rows of a tensor, as a rank does that has these."""
    from horovodrunner.flows.checkpoints.worker.shards import Part

    rows = whole[first:last]
    part = Part(
        "model.w",
        ("model", "w"),
        "raw",
        tuple(whole.shape),
        str(whole.dtype).removeprefix("torch."),
        (first, *[0] * (whole.dim() - 1)),
        tuple(rows.shape),
    )
    save(root, rank, [(part, rows)])


def load(root: Path, batch_bytes: int = 2**20, **targets: Any) -> dict[str, Any]:
    from horovodrunner.flows.checkpoints.worker.shard_reader import ShardReader, load_into

    reader = ShardReader(DirectorySource(root), batch_bytes=batch_bytes)
    state: dict[str, Any] = {"model": targets}
    load_into(state, reader, reader.read_metadata())
    return dict(state["model"])


def test_every_kind_of_tensor_comes_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = {name: torch.randn(5, 3).to(getattr(torch, name)) for name in DTYPES}
    whole |= {
        "number": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "turned": torch.randn(4, 6).t(),
        "every other": torch.randn(8, 2)[::2],
        "conjugate": torch.randn(3, dtype=torch.complex64).conj(),
        "sparse": torch.eye(3).to_sparse(),
    }
    save_whole(tmp_path, note={"epoch": [1, 2]}, **whole)
    targets = {
        name: torch.zeros_like(tensor).contiguous()
        for name, tensor in whole.items()
        if name != "sparse"
    }
    found = load(tmp_path, note={"epoch": []}, **targets)
    assert found.pop("note") == {"epoch": [1, 2]}
    for name, tensor in found.items():
        assert tensor.dtype == whole[name].dtype, name
        assert tensor.tolist() == whole[name].tolist(), name


def test_what_is_tied_is_written_once(tmp_path: Path) -> None:
    tied = torch.randn(1000)
    save_whole(tmp_path, first=tied, second=tied, other=tied.clone())
    size = (tmp_path / "rank-0" / "shards.bin").stat().st_size
    assert 2 * 4000 <= size < 2 * 4000 + 256
    found = load(tmp_path, first=torch.zeros(1000), second=torch.zeros(1000))
    assert torch.equal(found["first"], tied)
    assert torch.equal(found["second"], tied)


@pytest.mark.parametrize("batch_bytes", [1, 100, 2**20])
def test_parts_are_put_together(tmp_path: Path, batch_bytes: int) -> None:
    """Also in batches of less than a row; the second rank has none."""
    whole = torch.randn(7, 9)
    for rank, (first, last) in enumerate([(0, 3), (3, 3), (3, 7)]):
        save_rows(tmp_path, rank, whole, first, last)
    assert torch.equal(load(tmp_path, batch_bytes, w=torch.zeros(7, 9))["w"], whole)


def test_ranks_are_in_the_order_of_their_numbers_and_the_lowest_counts(tmp_path: Path) -> None:
    for rank in (10, 9):
        save_rows(tmp_path, rank, torch.full((2, 2), float(rank)), 0, 2)
    assert load(tmp_path, w=torch.zeros(2, 2))["w"].tolist() == [[9.0, 9.0], [9.0, 9.0]]


def test_a_part_that_is_missing_is_named(tmp_path: Path) -> None:
    whole = torch.randn(4, 2)
    save_rows(tmp_path, 0, whole, 0, 1)
    save_rows(tmp_path, 2, whole, 3, 4)
    with pytest.raises(CheckpointError, match=r"holds 4 of the 8 elements of 'model\.w'"):
        load(tmp_path, w=torch.zeros(4, 2))


def test_where_nothing_of_it_is_the_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").touch()
    with pytest.raises(CheckpointError, match=r"no shards.json .* only weights.bin"):
        load(tmp_path, w=torch.zeros(1))


def test_another_format_is_refused(tmp_path: Path) -> None:
    save_whole(tmp_path, w=torch.zeros(1))
    index = tmp_path / "rank-0" / "shards.json"
    index.write_text(index.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(ValueError, match=r"the format of rank-0/shards.json is 2; known is 1"):
        load(tmp_path, w=torch.zeros(1))


def test_copies_keep_what_is_tied_and_everything_else() -> None:
    from collections import OrderedDict

    from horovodrunner.flows.checkpoints.worker.staging import Copies

    weight = torch.nn.Parameter(torch.ones(3))
    state: Any = OrderedDict(first=weight, second=weight.detach(), steps=[1], n=(weight.sum(),))
    state._metadata = {"": {"version": 2}}
    copies = Copies()
    copied = copies.of_state(state)
    copies.finish()
    with torch.no_grad():
        weight.zero_()
    state["steps"].append(2)
    assert copied["first"].tolist() == [1.0, 1.0, 1.0]
    assert copied["first"] is copied["second"]
    assert copied["steps"] == [1]
    assert copied["n"][0].item() == 3.0
    assert copied._metadata == {"": {"version": 2}}


def test_files_that_are_stored_once_are_read_for_each_rank(tmp_path: Path) -> None:
    """Ranks with the same bytes in other rows: one file, and the manifest knows of the other."""
    from horovodrunner.flows.checkpoints.manifest import Part, StoredFile
    from horovodrunner.flows.checkpoints.store import draft
    from horovodrunner.flows.checkpoints.tree import sha256_of

    save_rows(tmp_path, 0, torch.zeros(4, 2), 0, 2)
    save_rows(tmp_path, 1, torch.zeros(4, 2), 2, 4)
    (tmp_path / "rank-1" / "shards.bin").unlink()
    stored = [
        StoredFile(
            name, (tmp_path / name).stat().st_size, sha256_of([(tmp_path / name).read_bytes()])
        )
        for name in ("rank-0/shards.bin", "rank-0/shards.json", "rank-1/shards.json")
    ]
    copies = {"rank-1/shards.bin": "rank-0/shards.bin"}
    manifest = draft(1, [Part(tuple(stored))], world_size=2, copies=copies)
    (tmp_path / "manifest.json").write_text(manifest.to_json())
    found = load(tmp_path, w=torch.ones(4, 2))
    assert torch.equal(found["w"], torch.zeros(4, 2))
