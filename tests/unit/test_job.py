"""The dataclasses and their way over the wire."""

from dataclasses import replace

import pytest

from horovodrunner.processes.task.coordinator import MAX_CONSEQUENCES, Coordinator
from horovodrunner.wire.frames import MAX_BODY_BYTES, MAX_HEADER_BYTES, encode_frame
from horovodrunner.wire.job import (
    Failure,
    FailureKind,
    JobSpec,
    Outcome,
    Success,
    WorkerSpec,
    join_chunks,
    split_chunks,
)
from tests.unit.test_coordinator import Driver, slots

FIRST = Failure(
    1,
    "a",
    "ValueError: x",
    FailureKind.EXCEPTION,
    "Traceback",
    exception_types=("builtins.ValueError", "builtins.Exception"),
    exception=b"pickle one",
)
SECOND = Failure(0, "b", "gone", signal="SIGKILL", exception=b"two", after_peer_loss=True)


@pytest.mark.parametrize("chunk_bytes", [1, 3, 1000])
@pytest.mark.parametrize(
    "outcome",
    [
        Outcome(),
        Outcome(success=Success(0, (10, 20))),
        Outcome(success=Success(3)),
        Outcome(failure=FIRST),
        Outcome(failure=FIRST, consequences=(SECOND,)),
    ],
)
def test_an_outcome_survives_being_cut_into_rows(outcome: Outcome, chunk_bytes: int) -> None:
    chunks = [bytes(chunk) for chunk in split_chunks(outcome, chunk_bytes)]
    assert join_chunks(chunks) == outcome
    assert all(len(chunk) <= chunk_bytes for chunk in chunks[1:])


def test_an_outcome_of_many_ranks_fits_a_frame() -> None:
    """However long their texts are, and whatever is in them."""
    slots_ = slots(MAX_CONSEQUENCES + 500)
    driver = Driver()
    it = Coordinator(slots_, driver, driver.shown.append)
    text = "\U0001f600" * 20_000
    longest = Failure(0, "h", text, traceback=text * 10, exception=bytes(4 * 1024 * 1024))
    for slot in slots_:
        it.ended(slot.rank, Outcome(failure=replace(longest, rank=slot.rank)))
    outcome = it.verdict()
    assert outcome is not None
    assert outcome.failure is not None
    assert outcome.failure.traceback == text * 10
    assert len(outcome.consequences) == MAX_CONSEQUENCES
    assert "...(truncated: 20,000 characters)" in outcome.consequences[0].summary
    header, body = outcome.to_frame()
    assert len(encode_frame("failed", body, outcome=header)) < MAX_HEADER_BYTES // 10
    assert len(body) < MAX_BODY_BYTES // 2
    assert Outcome.from_frame(header, body) == outcome


def test_a_worker_spec_survives_json() -> None:
    import json

    spec = WorkerSpec(2, "h", {"RANK": "2"}, return_result=True)
    assert WorkerSpec.from_header(json.loads(json.dumps(spec.to_header()))) == spec


def test_no_secret_and_no_payload_shows_in_a_job() -> None:
    job = JobSpec("id", 2, payload=b"PAYLOAD", token=b"TOKEN", environment={"MLFLOW_TOKEN": "x"})
    assert not any(word in repr(job) for word in ("PAYLOAD", "TOKEN", "MLFLOW"))
