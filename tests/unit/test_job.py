"""The dataclasses and their way over the wire."""

import pytest

from horovodrunner.core.job import (
    Failure,
    FailureKind,
    JobSpec,
    Outcome,
    Success,
    WorkerSpec,
    join_chunks,
    split_chunks,
)

FIRST = Failure(
    1, "a", "ValueError: x", FailureKind.EXCEPTION, "Traceback", exception=b"pickle one"
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


def test_a_worker_spec_survives_json() -> None:
    import json

    spec = WorkerSpec(2, "h", {"RANK": "2"}, return_result=True)
    assert WorkerSpec.from_header(json.loads(json.dumps(spec.to_header()))) == spec


def test_no_secret_and_no_payload_shows_in_a_job() -> None:
    job = JobSpec("id", 2, payload=b"PAYLOAD", token=b"TOKEN", environment={"MLFLOW_TOKEN": "x"})
    assert not any(word in repr(job) for word in ("PAYLOAD", "TOKEN", "MLFLOW"))
