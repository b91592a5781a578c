"""Which row comes when: every row once, the same order for every world size, well mixed."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import numpy as np
import pytest

from horovodrunner import DataError
from horovodrunner.data.order import EpochOrder, permuted
from horovodrunner.data.steps import EpochSteps, Remainder

BLOCK_ROWS = [7, 1, 30, 12, 25, 25, 3]
ROWS = sum(BLOCK_ROWS)


def located(order: EpochOrder, positions: Any) -> tuple[Any, Any]:
    """Return the block of each position's row, and its place there."""
    found, chosen = order.by_block(np.asarray(positions))
    blocks = np.repeat([block for block, _ in found], [len(rows) for _, rows in found])
    return blocks[chosen], np.concatenate([rows for _, rows in found])[chosen]


def stored_rows(order: EpochOrder, positions: Any) -> Any:
    """Return rows by their number in stored order."""
    blocks, rows = located(order, positions)
    return np.concatenate([[0], np.cumsum(BLOCK_ROWS)])[blocks] + rows


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7, 16, 100, 1000, 1023, 1024, 1025, 65_537])
def test_a_permutation_has_every_element_once(count: int) -> None:
    for key in range(5):
        found = permuted(np.arange(count), count, key)
        assert np.array_equal(np.sort(found), np.arange(count))


def test_a_permutation_is_a_function_of_the_index_alone() -> None:
    whole = permuted(np.arange(1000), 1000, 3, 4)
    some = np.array([999, 0, 17, 500])
    assert np.array_equal(permuted(some, 1000, 3, 4), whole[some])


def test_permutations_do_not_change_between_releases() -> None:
    """A run that goes on from a checkpoint must find the order of the release that wrote it."""
    assert permuted(np.arange(10), 10, 1, 2).tolist() == [0, 2, 5, 7, 4, 8, 3, 6, 9, 1]
    assert int(permuted(np.array([123_456]), 10_000_000, 7, 0, 3)[0]) == 6_502_704


def test_keys_choose_among_all_permutations() -> None:
    found = Counter(tuple(permuted(np.arange(4), 4, key).tolist()) for key in range(2400))
    assert len(found) == 24
    assert min(found.values()) > 50
    assert max(found.values()) < 200


@pytest.mark.parametrize("window_rows", [1, 10, 40, 10_000])
def test_every_row_comes_once_whatever_the_window(window_rows: int) -> None:
    order = EpochOrder(BLOCK_ROWS, shuffle=True, seed=1, epoch=2, window_rows=window_rows)
    assert sorted(stored_rows(order, range(ROWS)).tolist()) == list(range(ROWS))


def test_without_shuffling_the_order_is_the_stored_one() -> None:
    order = EpochOrder(BLOCK_ROWS, shuffle=False)
    assert stored_rows(order, range(ROWS)).tolist() == list(range(ROWS))
    blocks, _ = order.by_block(np.arange(5, 40))
    assert [(block, rows[0], rows[-1]) for block, rows in blocks] == [
        (0, 5, 6), (1, 0, 0), (2, 0, 29), (3, 0, 1)]  # fmt: skip


def test_seed_and_epoch_choose_the_order() -> None:
    def order(seed: int, epoch: int) -> tuple[int, ...]:
        made = EpochOrder(BLOCK_ROWS, shuffle=True, seed=seed, epoch=epoch)
        return tuple(stored_rows(made, range(ROWS)).tolist())

    assert order(1, 0) == order(1, 0)
    assert len({order(seed, epoch) for seed in (0, 1, -5) for epoch in (0, 1)}) == 6


def test_rows_are_mixed_as_well_as_in_a_full_permutation_within_one_window() -> None:
    count = 20_000
    order = EpochOrder([500] * 40, shuffle=True, seed=3, window_rows=count)
    blocks, rows = located(order, range(count))
    stored = blocks * 500 + rows
    place = np.empty(count, np.int64)
    place[stored] = np.arange(count)
    distance = np.abs(np.diff(place)).mean() / (count / 3)  # a permutation's neighbours: count / 3
    assert 0.97 < distance < 1.03
    assert abs(np.corrcoef(place, np.arange(count))[0, 1]) < 0.03


def test_rows_beyond_a_window_are_mixed_with_their_window() -> None:
    count, window = 20_000, 2_000
    order = EpochOrder([100] * 200, shuffle=True, seed=3, window_rows=window)
    blocks, _ = located(order, range(count))
    for start in range(0, count, window):
        assert len(set(blocks[start : start + window].tolist())) == window // 100
    assert abs(np.corrcoef(blocks, np.arange(count))[0, 1]) < 0.2
    assert order.most_blocks_in_a_window == window // 100


def all_steps(remainder: Remainder, rows: int, size: int, batch_size: int = 4) -> list[list[Any]]:
    ranks = [EpochSteps(rows, batch_size, rank, size, remainder) for rank in range(size)]
    return [[each.positions(step) for step in range(len(each))] for each in ranks]


@pytest.mark.parametrize("rows", [12, 13, 23, 24, 25, 96, 101])
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("remainder", ["drop", "pad", "split", "uneven"])
def test_ranks_take_every_row_once_in_equal_steps(
    remainder: Remainder, rows: int, size: int
) -> None:
    ranks = all_steps(remainder, rows, size)
    taken = Counter(at for rank in ranks for start, end in rank for at in range(start, end))
    whole = rows - rows % (4 * size)
    counts = {len(rank) for rank in ranks}
    if remainder == "drop":
        assert taken == Counter(range(whole))
    elif remainder == "uneven":
        assert taken == Counter(range(rows))
        assert max(counts) - min(counts) <= 1
        return
    elif remainder == "split":
        assert set(taken) == set(range(rows))
        assert taken.total() < rows + size
    else:
        assert taken == Counter(range(-(-rows // (4 * size)) * 4 * size))  # then from the beginning
    assert len(counts) == 1


def test_the_last_batch_is_shared_out_evenly_and_ranks_without_rows_have_none() -> None:
    assert [rank[-1] for rank in all_steps("uneven", 8 * 3 + 11, 2)] == [(32, 34), (34, 35)]
    assert [rank[-1] for rank in all_steps("uneven", 12 + 5, 3)] == [(12, 14), (14, 16), (16, 17)]
    assert [len(rank) for rank in all_steps("uneven", 12 + 2, 3)] == [2, 2, 1]


def test_or_ranks_without_rows_have_another_ones() -> None:
    assert all_steps("split", 8 * 3 + 11, 2) == all_steps("uneven", 8 * 3 + 11, 2)
    assert [rank[-1] for rank in all_steps("split", 12 + 2, 3)] == [(12, 13), (13, 14), (12, 13)]
    assert EpochSteps(14, 4, 0, 3, "split").summary().endswith("some ranks repeat a row in it")
    assert EpochSteps(15, 4, 0, 3, "split").summary().endswith("the last one is shorter")


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_a_global_batch_is_the_same_rows_for_any_number_of_ranks(size: int) -> None:
    ranks = [EpochSteps(100, 12 // size, rank, size, "pad") for rank in range(size)]
    for step in range(len(ranks[0])):
        positions = [rank.positions(step) for rank in ranks]
        assert positions[0][0] == step * 12
        assert positions[-1][1] == step * 12 + 12
        assert all(a[1] == b[0] for a, b in itertools.pairwise(positions))


def test_what_was_seen_is_not_seen_again_with_another_number_of_ranks() -> None:
    seen: list[int] = []
    first = [EpochSteps(101, 5, rank, 2, "uneven") for rank in range(2)]
    for step in range(3):
        seen += [at for rank in first for at in range(*rank.positions(step))]
    start = first[0].position_after(3)
    assert start == 30
    for rank in [EpochSteps(101, 4, rank, 5, "uneven", start) for rank in range(5)]:
        seen += [at for step in range(len(rank)) for at in range(*rank.positions(step))]
    assert sorted(seen) == list(range(101))


def test_nothing_is_left_at_the_end() -> None:
    for remainder in ("drop", "pad", "uneven"):
        assert len(EpochSteps(100, 5, 0, 2, remainder, start=100)) == 0


def test_too_few_rows_are_refused_with_the_numbers() -> None:
    with pytest.raises(DataError, match="2 rows, fewer than the 3 ranks"):
        EpochSteps(2, 1, 0, 3, "pad")
    with pytest.raises(DataError, match=r"100 rows, and 3 ranks with batch_size=50 take 150"):
        EpochSteps(100, 50, 0, 3, "drop")
    with pytest.raises(DataError, match="0 rows"):
        EpochSteps(0, 1, 0, 1, "pad")


@pytest.mark.parametrize(
    ("remainder", "words"),
    [
        ("drop", "33 batches a rank and epoch; 10 rows are left out of each epoch"),
        ("pad", "34 batches a rank and epoch; 20 rows come twice"),
        ("uneven", "34 batches a rank and epoch; the last one is shorter"),
    ],
)
def test_the_summary_of_an_epoch(remainder: Remainder, words: str) -> None:
    text = EpochSteps(1000, 10, 0, 3, remainder).summary()
    assert text == f"1,000 rows for 3 ranks in batches of 10: {words}"
    assert "2 ranks have none" in EpochSteps(31, 5, 0, 3, "uneven").summary()
