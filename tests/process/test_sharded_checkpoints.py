"""checkpoint.save_torch() and load_torch() with models that no rank holds whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from horovodrunner import HorovodRunner, checkpoint
from horovodrunner.errors import ArgumentValueError, CheckpointError, WorkerFailedError
from tests.process import sharded

pytest.importorskip("torch.distributed.fsdp", reason="needs torch")
pytestmark = pytest.mark.heavy


def chain(location: Path, *runs: tuple[str, int], first_steps: int = 2, **options: Any) -> None:
    """Train in the first run; every later one loads, compares bit for bit and saves again."""
    expected = None
    for step, (kind, ranks) in enumerate(runs):
        runner = HorovodRunner(np=-ranks, checkpoint_dir=location, on_checkpoint_error="raise")
        steps = 0 if step else first_steps
        found = runner.run(sharded.train_and_save, kind=kind, step=step, steps=steps, **options)
        expected = expected or found
        for got, wanted in zip(found, expected, strict=True):
            assert got == wanted, (kind, ranks)


@pytest.mark.timeout(400)
def test_a_sharded_model_goes_on_with_other_numbers_of_ranks(tmp_path: Path) -> None:
    chain(tmp_path, ("fsdp", 4), ("fsdp", 2), ("fsdp", 4), ("plain", 1), ("fsdp", 2))


@pytest.mark.timeout(400)
def test_meshes_of_all_kinds_save_while_main_goes_on(tmp_path: Path) -> None:
    """Main trains on, and leaves its process group, while the files are being written."""
    runs = ("hsdp", 4), ("2d", 4), ("tp", 2), ("plain", 1)
    chain(tmp_path, *runs, asynchronous=True)


def test_an_optimizer_that_has_no_state_yet_gets_none(tmp_path: Path) -> None:
    chain(tmp_path, ("fsdp", 2), ("fsdp", 1), ("plain", 1), first_steps=0)


@pytest.mark.parametrize("wraps", [True, False])
def test_a_wrapped_module_is_the_one_that_it_wraps(tmp_path: Path, wraps: bool) -> None:
    runner = HorovodRunner(np=-1, checkpoint_dir=tmp_path)
    saved = runner.run(sharded.save_or_load_wrapped, step=1, wraps=wraps, loads=False)
    loaded = runner.run(sharded.save_or_load_wrapped, step=2, wraps=not wraps, loads=True)
    assert loaded == saved


def test_what_numpy_keeps_can_be_loaded_as_well_as_saved(tmp_path: Path) -> None:
    runner = HorovodRunner(np=-1, checkpoint_dir=tmp_path)
    saved = runner.run(sharded.save_or_load_sampler, seed=1, loads=False)
    assert runner.run(sharded.save_or_load_sampler, seed=2, loads=True) == saved


@pytest.mark.parametrize(("before", "after"), [(4, 2), (2, 4)])
def test_a_rank_reads_the_bytes_that_it_needs(tmp_path: Path, before: int, after: int) -> None:
    size = 4 * sharded.ROWS * (sharded.COLUMNS + 1)
    HorovodRunner(np=-before, checkpoint_dir=tmp_path).run(sharded.save_large, step=1)
    runner = HorovodRunner(np=-after, checkpoint_dir=tmp_path)
    totals = runner.run(sharded.read_large, batch_bytes=size // 16)
    assert len(totals) == after
    assert max(totals) <= 1.1 * size / after, totals


def test_what_torch_has_saved_on_every_rank_is_read_by_fewer(tmp_path: Path) -> None:
    HorovodRunner(np=-3, checkpoint_dir=tmp_path).run(sharded.save_with_dcp, step=1)
    runner = HorovodRunner(np=-2, checkpoint_dir=tmp_path)
    found, note = runner.run(sharded.load_with_dcp, directory="dcp")
    assert note == {"epoch": 7}
    expected = HorovodRunner(np=-1, checkpoint_dir=tmp_path / "plain").run(
        sharded.save_plainly, step=1, seed=1
    )
    assert found == expected


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Return where a sharded checkpoint is, and the weights in it."""
    location = tmp_path_factory.mktemp("saved")
    runner = HorovodRunner(np=-2, checkpoint_dir=location)
    return location, runner.run(sharded.train_and_save, kind="fsdp", step=0, steps=1)[0]


def test_torch_reads_what_save_torch_has_saved(saved: tuple[Path, dict[str, Any]]) -> None:
    location, weights = saved
    runner = HorovodRunner(np=-1, checkpoint_dir=location)
    assert runner.run(sharded.load_with_dcp, directory="") == (weights, None)


@pytest.mark.parametrize("ranks", [1, 3])
def test_ranks_that_want_the_whole_fetch_it_once_for_their_host(
    saved: tuple[Path, dict[str, Any]], ranks: int
) -> None:
    location, weights = saved
    runner = HorovodRunner(np=-ranks, checkpoint_dir=location, results="all")
    runner.run(sharded.load_whole, names=["model", "optimizer"])
    for read, loaded in runner.results:
        assert loaded == list(weights.values())
        assert (read > 0) == (ranks == 1)  # a host with one rank has nobody to share with


TOLD = {
    "no module": "ArgumentValueError: 7 of the parameters of 'optimizer' are of no module",
    "other name": "step 0 has no net.pt, only model, optimizer, schedule.pt: load_torch",
    "other size": "step 0 does not fit 'model': Size mismatch",
    "more": "does not fit 'model': Missing key in checkpoint state_dict: model.more.weight",
    "less": "does not fit 'model': it has no last.bias, last.weight, which the checkpoint has",
    "other groups": "does not fit 'optimizer': it has 1 groups of parameters, the checkpoint 2",
    "meta": "does not fit 'model': it is on the device 'meta', which has no memory",
}


def test_what_does_not_fit_is_named(saved: tuple[Path, dict[str, Any]]) -> None:
    runner = HorovodRunner(np=-1, checkpoint_dir=saved[0])
    texts = runner.run(sharded.load_others, ways=list(TOLD))
    for how, told in TOLD.items():
        assert told in texts[how]


def test_fsdp1_is_gathered_and_its_optimizer_refused(tmp_path: Path) -> None:
    runner = HorovodRunner(np=-2, checkpoint_dir=tmp_path)
    text = runner.run(sharded.save_flattened, step=1)
    assert "'optimizer' is an optimizer of a FullyShardedDataParallel (FSDP1)" in text
    (saved,) = runner.checkpoints
    assert sorted(path.name for path in Path(saved.path).iterdir()) == ["manifest.json", "model.pt"]


@pytest.mark.parametrize("second", ["fsdp", "plain"])
def test_stages_of_which_not_all_are_sharded_are_saved_by_every_rank(
    tmp_path: Path, second: str
) -> None:
    runner = HorovodRunner(
        np=-3, checkpoint_dir=tmp_path, results="all", on_checkpoint_error="raise"
    )
    runner.run(sharded.stages, step=1, ranks="all", second=second)
    saved = list(runner.results)
    assert len({str(names) for names, _, _ in saved}) == (2 if second == "fsdp" else 3)
    runner.run(sharded.stages, step=2, ranks=None, loads=True, second=second)
    assert list(runner.results) == saved


def test_stages_that_do_not_look_alike_are_refused(tmp_path: Path) -> None:
    runner = HorovodRunner(np=-3, checkpoint_dir=tmp_path, on_checkpoint_error="raise")
    told = r'sharded, .* on ranks? .* and not on rank 0, .*ranks="all"'
    with pytest.raises(CheckpointError, match=told):
        runner.run(sharded.stages, step=1, ranks=None)


def test_another_number_of_ranks_loads_what_rank_0_had(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    HorovodRunner(np=-2, checkpoint_dir=tmp_path).run(sharded.save_or_load_own, ranks="all")
    found = HorovodRunner(np=-1, checkpoint_dir=tmp_path).run(sharded.save_or_load_own)
    assert found == 0
    told = "the 2 ranks of the checkpoint did not save the same own.pt"
    assert told in capfd.readouterr().out


def test_rank_0_does_not_save_alone_what_every_rank_has_another_of() -> None:
    with pytest.raises(ArgumentValueError, match=r"save_torch\(ranks=0\): random has another part"):
        checkpoint.save_torch(1, ranks=0, random=checkpoint.RandomState())


def test_stages_that_have_the_same_names_get_their_own_back(tmp_path: Path) -> None:
    runner = HorovodRunner(np=-2, checkpoint_dir=tmp_path, results="all")
    runner.run(sharded.stages_of_one_name, loads=False)
    assert list(runner.results) == [[10.0, 1.0], [11.0, 2.0]]
    runner.run(sharded.stages_of_one_name, loads=True)
    assert list(runner.results) == [[10.0, 1.0], [11.0, 2.0]]
    with pytest.raises(WorkerFailedError, match="was saved by rank 0 and by rank 1, which did not"):
        HorovodRunner(np=-3, checkpoint_dir=tmp_path).run(
            sharded.stages_of_one_name, loads=True, together=True
        )


def test_what_some_ranks_had_whole_is_not_guessed_by_another_number(tmp_path: Path) -> None:
    HorovodRunner(np=-3, checkpoint_dir=tmp_path).run(sharded.stages, step=1, ranks="all")
    runner = HorovodRunner(np=-2, checkpoint_dir=tmp_path)
    told = r"'stage' was saved whole \(rank-0/stage.pt\) by some of the 3 ranks"
    with pytest.raises(WorkerFailedError, match=told):
        runner.run(sharded.stages, step=2, ranks="all", loads=True, second="plain")


@pytest.mark.parametrize("ranks", [1, 2])
def test_half_a_model_is_not_loaded(tmp_path: Path, ranks: int) -> None:
    HorovodRunner(np=-2, checkpoint_dir=tmp_path).run(sharded.save_half_of_it)
    runner = HorovodRunner(np=-ranks, checkpoint_dir=tmp_path)
    with pytest.raises(WorkerFailedError, match=r"the checkpoint holds \d+ of the \d+ elements of"):
        runner.run(sharded.load_whole, names=["model"])


def test_main_may_change_types_while_files_are_written(tmp_path: Path) -> None:
    runner = HorovodRunner(np=-2, checkpoint_dir=tmp_path, on_checkpoint_error="raise")
    saved = runner.run(sharded.save_and_change_types, loads=False)
    assert runner.run(sharded.save_and_change_types, loads=True) == saved
