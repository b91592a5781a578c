"""Runs that start anew beside older checkpoints, on a path and behind URLs."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from horovodrunner.flows.checkpoints.driver import new_history, newest_history
from horovodrunner.flows.checkpoints.store import CheckpointStore


def save(store: CheckpointStore, step: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "state").write_text(str(step))
        store.put(step, Path(directory))


def steps(store: CheckpointStore) -> list[int]:
    return [manifest.step for manifest in store.manifests()]


@pytest.fixture(params=["path", "file"])
def location(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"{tmp_path}/kept" if request.param == "path" else f"file://{tmp_path}/kept"


def test_what_starts_anew_is_found_and_older_ones_stay(location: str) -> None:
    root = CheckpointStore(location, keep=2)
    assert newest_history(root).location == new_history(root).location == root.location
    for step in (7, 8, 9):
        save(root, step)
    anew = new_history(root)
    assert (anew.location.startswith(f"{root.location}/run-0002-"), anew.keep) == (True, root.keep)
    # before it has saved anything there is nothing to go on from but the old ones
    assert newest_history(root).location == root.location
    for step in (0, 1, 2):
        save(anew, step)
    assert newest_history(root, recover=True).location == anew.location
    assert (steps(root), steps(anew)) == ([9, 8], [2, 1])
    third = new_history(root)
    assert "/run-0003-" in third.location
    save(third, 0)
    assert steps(newest_history(root)) == [0]
    assert (steps(root), steps(anew)) == ([9, 8], [2, 1])


def test_two_that_start_anew_at_once_do_not_meet(location: str) -> None:
    root = CheckpointStore(location, keep=2)
    save(root, 7)
    one, other = new_history(root), new_history(root)
    assert one.location != other.location
    save(one, 0)
    save(other, 0)
    assert newest_history(root).location in {one.location, other.location}


def test_damaged_ones_and_what_a_crash_left_aside_count(tmp_path: Path) -> None:
    root = CheckpointStore(tmp_path, keep=2)
    save(root, 7)
    anew = new_history(root)
    save(anew, 0)
    final = Path(anew.path_of(0))
    (final / "manifest.json").write_text("half")
    # to go on from the old ones instead would mix two trainings
    assert newest_history(root).location == anew.location
    final.rename(final.with_name(".replaced-step-00000000-00000000"))
    assert newest_history(root).location == root.location
    assert newest_history(root, recover=True).location == anew.location


def test_the_first_run_needs_no_directory_of_its_own(tmp_path: Path) -> None:
    root = CheckpointStore(tmp_path / "not there", keep=2)
    assert new_history(root).location == root.location
    (tmp_path / "not there" / "run-of-mine").mkdir(parents=True)
    assert new_history(root).location == root.location
