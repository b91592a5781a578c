"""How a run ended, as plain data and over the wire."""

from dataclasses import replace

import pytest

from horovodrunner.flows.call.job import JobSpec
from horovodrunner.flows.outcome.outcome import (
    Failure,
    FailureKind,
    Outcome,
    Success,
)
from horovodrunner.flows.outcome.task import MAX_CONSEQUENCES, RunOutcome
from horovodrunner.flows.results.driver import ResultStore
from horovodrunner.wire.events import MAX_BODY_BYTES, FrameError
from tests.unit.test_run_outcome import slots

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
def test_an_outcome_survives_the_wire_and_a_row(outcome: Outcome) -> None:
    assert Outcome.from_bytes(outcome.to_bytes()) == outcome
    assert ResultStore().take_rows([outcome.to_bytes()]) == outcome


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80\x04.",
        b"[]",
        b"3",
        b"{}",
        b"[" * 100_000,
        b'{"rank": 0}',
        b'{"rank": "x", "layout": []}',
        b'{"failures": [3]}',
        b'{"failures": [{"kind": "new"}]}',
        b'{"failures": [{"kind": "data", "exception_types": [], "exception": "", "x": 1}]}',
    ],
)
def test_bytes_that_are_no_outcome_are_refused(data: bytes) -> None:
    with pytest.raises(FrameError, match="an outcome that cannot be read"):
        Outcome.from_bytes(data)


def test_an_outcome_of_many_ranks_fits_a_frame() -> None:
    """However long their texts are, and whatever is in them."""
    slots_ = slots(MAX_CONSEQUENCES + 500)
    it = RunOutcome(slots_)
    text = "\U0001f600" * 20_000
    longest = Failure(0, "h", text, traceback=text * 10, exception=bytes(4 * 1024 * 1024))
    for slot in slots_:
        it.ended(slot.rank, Outcome(failure=replace(longest, rank=slot.rank)))
    outcome = it.summary({})
    assert outcome is not None
    assert outcome.failure is not None
    assert outcome.failure.traceback == text * 10
    assert len(outcome.consequences) == MAX_CONSEQUENCES
    assert "...(truncated: 20,000 characters)" in outcome.consequences[0].summary
    body = outcome.to_bytes()
    assert len(body) < MAX_BODY_BYTES // 2
    assert Outcome.from_bytes(body) == outcome


def test_no_secret_and_no_payload_shows_in_a_job() -> None:
    job = JobSpec("id", 2, payload=b"PAYLOAD", token=b"TOKEN", environment={"MLFLOW_TOKEN": "x"})
    assert not any(word in repr(job) for word in ("PAYLOAD", "TOKEN", "MLFLOW"))
