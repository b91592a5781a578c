"""Data sets in runs on this machine: going on in the middle of an epoch."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from horovodrunner import HorovodRunner, WorkerFailedError, checkpoint, data

ROWS = 500


def test_a_run_that_was_killed_goes_on_in_the_middle_of_the_epoch(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """With another number of ranks: nothing is seen twice after the checkpoint, nothing missed."""
    logs = tmp_path / "logs"
    logs.mkdir()

    def main(batch_size: int, dies_at: int | None) -> dict[str, int]:
        import json

        latest = checkpoint.latest()
        batches = rows.numpy(batch_size, shuffle=True, seed=9, epoch=3, remainder="uneven")
        if latest is not None:
            batches.load_state_dict(json.loads((latest / "state.json").read_text()))
        log = Path(logs, f"{os.environ['WORLD_SIZE']}-{os.environ['RANK']}").open("w")  # noqa: SIM115
        for number, batch in enumerate(batches, 1):
            position = batches.state_dict()["position"]
            log.writelines(f"{position} {row}\n" for row in batch["row"])
            log.flush()
            if number == 6 and dies_at is not None:
                with checkpoint.save(step=position) as directory:
                    (directory / "state.json").write_text(json.dumps(batches.state_dict()))
            if number == dies_at and os.environ["RANK"] == "0":
                (logs / "saved").touch()
            while number == dies_at:
                # An allreduce would hold rank 1 back: it dies after rank 0's checkpoint.
                if os.environ["RANK"] == "1" and (logs / "saved").exists():
                    os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(0.01)
        return batches.state_dict()

    def seen(size: int) -> list[tuple[int, int]]:
        lines = [
            line.split()
            for path in logs.glob(f"{size}-*")
            for line in path.read_text().splitlines()
        ]
        return [(int(position), int(row)) for position, row in lines]

    with data.from_arrow(pa.table({"row": range(ROWS)})) as rows:
        runner: dict[str, Any] = {"checkpoint_dir": str(tmp_path / "checkpoints")}
        with pytest.raises(WorkerFailedError, match="SIGKILL"):
            HorovodRunner(np=-2, **runner).run(main, batch_size=15, dies_at=9)
        (saved,) = HorovodRunner(np=-3, **runner).checkpoints
        assert saved.step == 180
        ended = HorovodRunner(np=-3, **runner).run(main, batch_size=20, dies_at=None)
    assert ended == {"epoch": 4, "position": 0}
    before = [row for position, row in seen(2) if position <= 180]
    assert len(seen(2)) > len(before)
    after = [row for _, row in seen(3)]
    assert sorted(before + after) == list(range(ROWS))
    said = "500 rows for 3 ranks in batches of 20: 9 batches a rank and epoch; the last one is"
    assert said in capfd.readouterr().out
