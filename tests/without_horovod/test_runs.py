"""Everything whose main does not import Horovod, in an environment that has none.

``make test-without-horovod`` makes that environment and runs these tests in it.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from horovodrunner import (
    ConfigurationError,
    HorovodRunner,
    WorkerFailedError,
    checkpoint,
    data,
    doctor,
)
from tests.horovod.test_tensorflow_distribution import mirrored
from tests.horovod.test_torch_distributed import accelerated, train

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("horovod") is not None, reason="Horovod is installed here"
)

STALL_SECONDS = 90
BUILD = r"-m horovodrunner build-horovod` there"


def test_the_variables_name_no_rendezvous() -> None:
    def main() -> dict[str, str]:
        return dict(os.environ)

    environment = HorovodRunner(np=-2).run(main)
    assert environment["HOROVOD_SIZE"] == environment["WORLD_SIZE"] == "2"
    assert not [name for name in environment if "RENDEZVOUS" in name]


@pytest.mark.spark
@pytest.mark.usefixtures("spark")
def test_torch_distributed_trains() -> None:
    trained = HorovodRunner(np=2, stall_timeout=STALL_SECONDS).run(train, lr=0.1, use_gpu=False)
    for name in ("ddp", "fsdp", "fsdp2"):
        first, second = (weights[name] for weights in trained["weights"])
        assert first == second == pytest.approx(trained["reference"], rel=1e-4, abs=1e-6), name


def test_accelerate_finds_the_ranks() -> None:
    assert HorovodRunner(np=-2).run(accelerated) == (2, 0, 0, 3.0)


@pytest.mark.slow
def test_lightning_trains_over_the_ranks() -> None:
    def main() -> tuple[int, int]:
        import warnings

        import torch
        from lightning import LightningModule, Trainer

        warnings.simplefilter("ignore")

        class Model(LightningModule):  # type: ignore[misc]
            def __init__(self) -> None:
                super().__init__()
                self.layer = torch.nn.Linear(3, 1)

            def training_step(self, batch: Any, _: int) -> Any:
                return self.layer(batch[0]).square().mean()

            def configure_optimizers(self) -> Any:
                return torch.optim.SGD(self.parameters(), lr=0.1)

        rows = torch.utils.data.TensorDataset(torch.ones(8, 3))
        trainer = Trainer(
            accelerator="cpu", strategy="ddp", devices=2, max_epochs=1, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(Model(), torch.utils.data.DataLoader(rows, batch_size=4))
        return trainer.world_size, trainer.global_step

    assert HorovodRunner(np=-2).run(main) == (2, 1)


@pytest.mark.slow
def test_tensorflows_own_strategy_trains() -> None:
    seen = HorovodRunner(np=-2, tf_config=True, stall_timeout=STALL_SECONDS).run(mirrored)
    assert seen["replicas"] == 2
    assert seen["fit"] == pytest.approx(seen["loop"], rel=1e-3)


@pytest.mark.spark
@pytest.mark.usefixtures("spark")
def test_a_run_restarts_from_its_checkpoint_with_its_data(tmp_path: Path) -> None:
    def main() -> tuple[int, int, int]:
        latest = checkpoint.latest()
        start = latest.step if latest is not None else 0
        total = sum(int(batch["row"].sum()) for batch in rows.numpy(5))
        with checkpoint.save(step=start + 1) as directory:
            (directory / "total").write_text(str(total))
        if checkpoint.attempt == 1 and os.environ["RANK"] == "1":
            while not any(Path(kept).iterdir()):
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        return checkpoint.attempt, start, total

    kept = str(tmp_path / "kept")
    Path(kept).mkdir()
    with data.from_arrow(pa.table({"row": range(20)})) as rows:
        runner = HorovodRunner(np=2, checkpoint_dir=kept, max_restarts=1)
        attempt, start, total = runner.run(main)
    assert (attempt, start) == (2, 1)
    assert 0 < total < sum(range(20))


@pytest.mark.spark
@pytest.mark.usefixtures("spark")
@pytest.mark.parametrize("np", [-2, 2])
def test_a_main_that_imports_horovod_is_told_how_to_build_it(np: int) -> None:
    def main() -> None:
        import horovod.torch as hvd

        hvd.init()

    with pytest.raises(WorkerFailedError, match=BUILD) as caught:
        HorovodRunner(np=np).run(main)
    assert "No module named 'horovod'" in caught.value.summary
    assert "import horovod.torch as hvd" in caught.value.traceback


def test_options_of_horovodrun_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="build-horovod"):
        HorovodRunner(np=2, horovodrun_args=["--timeline-filename", "t.json"])


def test_the_doctor_calls_it_optional() -> None:
    finding = doctor._horovod()
    assert (finding.verdict, finding.remedy) == ("note", "python -m horovodrunner build-horovod")
    assert "only by a main that imports it" in finding.text
