"""Parts of stages that have the same names, and of copies of one model."""

from __future__ import annotations

import pytest

pytest.importorskip("torch.distributed.tensor", reason="needs torch")

from horovodrunner.flows.checkpoints.worker.shards import Part
from horovodrunner.flows.checkpoints.worker.stages import Index, parts_for


def index(rank: int, *keys: str, groups: dict[str, list[int]] | None = None, at: int = 0) -> Index:
    parts = [
        Part(key, tuple(key.split(".")), "raw", (4,), "float32", (at,), (2,), f"rank-{rank}/x.bin")
        for key in keys
    ]
    return Index(rank, parts, {"model": [rank]} if groups is None else groups)


STAGES = [
    index(0, "model.a", groups={"model": [0, 1]}),
    index(1, "model.a", groups={"model": [0, 1]}, at=2),
    index(2, "model.a", groups={"model": [2, 3]}),
    index(3, "model.a", groups={"model": [2, 3]}, at=2),
]


def files(own_rank: int | None, indexes: list[Index], same: str = "") -> list[str]:
    def content_of(path: str) -> str:
        return path if not same else str(int(path[5]) % 2)

    parts, clashes = parts_for(own_rank, indexes, content_of)
    assert not clashes, clashes
    return [part.file.partition("/")[0] for part in parts]


def test_a_rank_has_the_parts_of_its_own_stage() -> None:
    assert files(1, STAGES) == ["rank-0", "rank-1"]
    assert files(2, STAGES) == ["rank-2", "rank-3"]


def test_another_number_of_ranks_cannot_choose_a_stage() -> None:
    _, clashes = parts_for(None, STAGES, str)
    assert clashes["model.a"].startswith(
        "'model.a' was saved by ranks 0 and 1 and by ranks 2 and 3"
    )


def test_copies_of_one_model_are_as_good_as_one() -> None:
    assert files(None, STAGES, same="yes") == ["rank-0", "rank-1", "rank-2", "rank-3"]


def test_stages_with_names_of_their_own_are_one_model_elsewhere() -> None:
    assert files(None, [index(0, "model.a"), index(1, "model.b")]) == ["rank-0", "rank-1"]
    assert files(1, [index(0, "model.a"), index(1, "model.b")]) == ["rank-1"]


def test_meshes_that_share_a_rank_are_of_one_stage() -> None:
    crossed = [[0, 1, 2], [0, 1, 3], [0, 2, 3], [1, 2, 3]]
    found = [index(r, f"model.{r}", groups={"model": ranks}) for r, ranks in enumerate(crossed)]
    assert files(3, found) == ["rank-0", "rank-1", "rank-2", "rank-3"]


def test_a_rank_that_has_none_of_it_and_indexes_without_groups_take_all() -> None:
    assert files(3, [index(0, "model.a"), index(1, "model.b")]) == ["rank-0", "rank-1"]
    assert files(1, [index(0, "model.a", groups={}), index(1, "model.b", groups={})]) == [
        "rank-0",
        "rank-1",
    ]
