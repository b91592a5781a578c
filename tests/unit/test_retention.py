"""The newest checkpoints are kept, the best, and each n-th step's; nothing else is."""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from horovodrunner.flows.checkpoints.best import BestNotes
from horovodrunner.flows.checkpoints.manifest import Manifest
from horovodrunner.flows.checkpoints.retention import Best, Retention
from horovodrunner.flows.checkpoints.saved import saved_in
from horovodrunner.flows.checkpoints.store import CheckpointStore
from horovodrunner.flows.checkpoints.tree import pieces_of_tree
from horovodrunner.wire.events import CheckpointStored
from tests import processes

LOSS = Best("loss", "min")


@pytest.fixture(params=["", "file://"], ids=["path", "URL"])
def location(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"{request.param}{tmp_path}/kept"


@pytest.fixture
def files(tmp_path: Path) -> Path:
    directory = tmp_path / "files"
    directory.mkdir()
    (directory / "state").write_text("weights")
    return directory


def manifest(step: int, sequence: int, metrics: Mapping[str, float]) -> Manifest:
    return Manifest(step, sequence, "2026-01-01T00:00:00+00:00", (), metrics=metrics)


def steps(store: CheckpointStore) -> list[int]:
    return sorted(each.step for each in store.manifests())


def save(store: CheckpointStore, files: Path, step: int, **metrics: float) -> None:
    store.put_pieces(step, pieces_of_tree(files), metrics)


def test_the_best_and_every_nth_are_kept_beside_the_newest(location: str, files: Path) -> None:
    store = CheckpointStore(location, Retention(2, LOSS, every=4))
    losses = [0.9, 0.3, 0.5, 0.4, 0.6, 0.7, math.nan, 0.8, 0.35, 0.9]
    for step, loss in enumerate(losses):
        save(store, files, step, loss=loss)
    assert steps(store) == [0, 1, 4, 8, 9]
    save(store, files, 10, loss=0.3)  # as good as the best, and newer
    assert steps(store) == [0, 4, 8, 9, 10]
    save(store, files, 11)
    save(store, files, 13, other=0.0)
    assert steps(store) == [0, 4, 8, 10, 11, 13]
    save(store, files, 10, loss=2.0)  # what was the best is replaced
    save(store, files, 14, loss=3.0)
    save(store, files, 15, loss=4.0)
    assert steps(store) == [0, 4, 8, 14, 15]
    assert [each.step for each in LOSS.among(store.manifests())] == [8]


def test_the_best_three_by_the_highest(location: str, files: Path) -> None:
    best = Best("acc", "max", 3)
    store = CheckpointStore(location, Retention(1, best))
    for step, acc in enumerate([0.5, 0.9, 0.7, math.inf, -math.inf, 0.8, 0.1]):
        save(store, files, step, acc=acc)
    assert steps(store) == [1, 3, 5, 6]
    assert [each.step for each in best.among(saved_in(store)[::-1])] == [3, 1, 5]


def test_what_an_earlier_run_kept_without_knowing_why_may_be_the_best(
    location: str, files: Path
) -> None:
    earlier = CheckpointStore(location, 3)
    for step, loss in enumerate([0.1, 0.5, 0.2, 0.6]):
        save(earlier, files, step, loss=loss)
    store = CheckpointStore(location, Retention(1, LOSS))
    save(store, files, 4, loss=0.9)
    assert steps(store) == [2, 4]


def test_epochs_and_histories_keep_by_the_same_rule(location: str, files: Path) -> None:
    root = CheckpointStore(location, Retention(1, LOSS, every=5))
    first = root.begin_epoch(1, resume=True)
    for step, loss in ((5, 0.9), (6, 0.2), (7, 0.8)):
        save(first, files, step, loss=loss)
    second = root.begin_epoch(2, resume=True)  # takes over all of them
    save(second, files, 8, loss=0.4)
    assert steps(second) == [5, 6, 8]
    assert root.directories() == ["epoch-000002"]


def test_what_a_run_goes_on_from_is_kept_as_well(location: str, files: Path) -> None:
    store = CheckpointStore(location, Retention(1, LOSS))
    save(store, files, 1, loss=0.1)
    save(store, files, 2, loss=0.2)
    assert store.find_latest()[0] is not None
    save(store, files, 3, loss=0.3)
    assert steps(store) == [1, 2, 3]
    save(store, files, 4, loss=0.05)
    assert steps(store) == [2, 4]


@pytest.mark.parametrize("method", ["put_part", "_prune"])
def test_a_crash_before_or_after_the_new_one_counts_loses_nothing(
    location: str, files: Path, method: str
) -> None:
    store = CheckpointStore(location, Retention(1, LOSS))
    save(store, files, 1, loss=0.1)
    save(store, files, 2, loss=0.2)
    script = """
import os, sys
from pathlib import Path
from horovodrunner.flows.checkpoints.retention import Best, Retention
from horovodrunner.flows.checkpoints.store import CheckpointStore
from horovodrunner.flows.checkpoints.tree import pieces_of_tree

location, files, method = sys.argv[1:]
store = CheckpointStore(location, Retention(1, Best("loss", "min")))
act = getattr(store, method)

def crash(*arguments):
    if method == "put_part":
        act(*arguments)
    os._exit(7)

setattr(store, method, crash)
store.put_pieces(3, pieces_of_tree(Path(files)), {"loss": 0.05})
"""
    done = processes.run([sys.executable, "-c", script, location, str(files), method])
    assert done.returncode == 7
    again = CheckpointStore(location, Retention(1, LOSS))
    counts = method == "_prune"
    assert steps(again) == ([1, 2, 3] if counts else [1, 2])
    again.prune()
    assert steps(again) == ([3] if counts else [1, 2])


def test_any_order_of_saves_keeps_what_a_naive_list_keeps(tmp_path: Path) -> None:
    rng = random.Random(7)
    for _ in range(300):
        mode, count = rng.choice(["min", "max"]), rng.choice([1, 1, 2, 3])
        newest, every = rng.choice([1, 2, 3]), rng.choice([None, None, 2, 3, 5])
        best = rng.choice([None, Best("m", mode, count), Best("m", mode, count)])
        retention = Retention(newest, best, every)
        stored: list[Manifest] = []
        for sequence in range(25):
            metrics = rng.choice([{}, {"m": math.nan}, {"m": float(rng.randrange(6))}])
            new = manifest(rng.randrange(20), sequence, metrics)
            stored = [new, *(each for each in stored if each.step != new.step)]
            gone = retention.too_old(stored)
            kept = [each for each in stored if each not in gone]
            assert kept == naive(stored, retention)
            stored = kept


def naive(newest_first: list[Manifest], retention: Retention) -> list[Manifest]:
    """Compare each with each."""
    kept = []
    for place, each in enumerate(newest_first):
        is_kept = place < retention.newest
        if retention.every is not None and each.step % retention.every == 0:
            is_kept = True
        if retention.best is not None:
            value = each.metrics.get("m", math.nan)
            better = 0
            for other_place, other in enumerate(newest_first):
                rival = other.metrics.get("m", math.nan)
                wins = rival < value if retention.best.mode == "min" else rival > value
                better += wins or (rival == value and other_place < place)
            is_kept |= not math.isnan(value) and better < retention.best.count
        if is_kept:
            kept.append(each)
    return kept


class TestNotes:
    def noted(self, best: Best, *events: CheckpointStored, stored: Any = ()) -> list[str]:
        notes: list[str] = []
        observer = BestNotes(best, lambda: stored, lambda text, routine=False: notes.append(text))
        observer.begin(1)
        for event in events:
            observer.handlers[CheckpointStored](event)
            observer.begin(2)  # what is known stays
        return notes

    def test_each_one_that_is_better_than_all_before(self) -> None:
        losses = [0.5, 0.6, math.nan, 0.5, 0.25]
        events = [CheckpointStored(step, {"loss": loss}) for step, loss in enumerate(losses)]
        assert self.noted(LOSS, *events) == [
            "step 0 is the best so far: loss 0.5000",
            "step 4 is the best so far: loss 0.2500",
        ]
        earlier = [manifest(9, 1, {"loss": 0.3})]
        assert self.noted(LOSS, *events, stored=earlier) == [
            "step 4 is the best so far: loss 0.2500"
        ]
        assert self.noted(Best("loss", "max"), *events)[1:] == [
            "step 1 is the best so far: loss 0.6000"
        ]

    def test_one_that_is_replaced_does_not_count(self) -> None:
        losses = [(1, 0.1), (1, 0.9), (2, 0.5)]
        events = [CheckpointStored(step, {"loss": loss}) for step, loss in losses]
        notes = self.noted(LOSS, *events)
        assert [note[:6] for note in notes] == ["step 1", "step 1", "step 2"]

    def test_a_metric_that_none_has_is_told_once(self) -> None:
        events = [CheckpointStored(step, {"loss": 1.0, "a\nb": 2.0}) for step in range(3)]
        (note,) = self.noted(Best("val_loss", "min"), *events)
        assert note.startswith(
            "the checkpoint of step 0 has no 'val_loss' and is never the best (it has loss, a b; "
        )
        (note,) = self.noted(Best("val_loss", "min"), CheckpointStored(3))
        assert "it has no metrics" in note
        # between two validations that is as it should be
        known = [manifest(9, 1, {"val_loss": 0.1})]
        assert self.noted(Best("val_loss", "min"), *events, stored=known) == []
