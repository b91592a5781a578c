"""When each phase of a run began and ended, over all ranks."""

from __future__ import annotations

from horovodrunner.flows.telemetry.phases import Phase, Spans


def test_a_phase_lasts_from_the_first_rank_to_the_last_which_is_named() -> None:
    spans = Spans()
    spans.add_all({"imports": [2.0, 5.0], "main": [6.0, 9.0]}, rank=0)
    spans.add_all({"imports": [1.0, 4.0], "main": [6.5, 9.5]}, rank=1)
    spans.add("pickle", 0.0, 0.5)
    assert spans.phases() == (
        Phase("pickle", 0.0, 0.5),
        Phase("imports", 1.0, 5.0, 0),
        Phase("main", 6.0, 9.5, 1),
    )
    assert spans.phases()[2].seconds == 3.5
