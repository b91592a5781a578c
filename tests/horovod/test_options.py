"""The options of horovodrun, read by Horovod's own parser."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest

from horovodrunner import ArgumentValueError, ConfigurationError, HorovodRunner

pytest.importorskip("horovod")

from horovodrunner.placement.rendezvous import REFUSED, _parse, environment_of

pytestmark = pytest.mark.horovod

# Every option that is accepted, with what it makes horovodrun set.
TIMELINE = {"HOROVOD_TIMELINE": "t.json"}
AUTOTUNE = {"HOROVOD_AUTOTUNE": "1"}
ACCEPTED: dict[str, tuple[str, dict[str, str]]] = {
    "--fusion-threshold-mb": ("32", {"HOROVOD_FUSION_THRESHOLD": str(32 << 20)}),
    "--cycle-time-ms": ("2.5", {"HOROVOD_CYCLE_TIME": "2.5"}),
    "--cache-capacity": ("7", {"HOROVOD_CACHE_CAPACITY": "7"}),
    "--hierarchical-allreduce": ("", {"HOROVOD_HIERARCHICAL_ALLREDUCE": "1"}),
    "--no-hierarchical-allreduce": ("", {"HOROVOD_HIERARCHICAL_ALLREDUCE": "0"}),
    "--hierarchical-allgather": ("", {"HOROVOD_HIERARCHICAL_ALLGATHER": "1"}),
    "--no-hierarchical-allgather": ("", {"HOROVOD_HIERARCHICAL_ALLGATHER": "0"}),
    "--torus-allreduce": ("", {"HOROVOD_TORUS_ALLREDUCE": "1"}),
    "--no-torus-allreduce": ("", {"HOROVOD_TORUS_ALLREDUCE": "0"}),
    "--autotune": ("", AUTOTUNE),
    "--no-autotune": ("", {"HOROVOD_AUTOTUNE": "0"}),
    "--autotune-log-file": ("a.csv --autotune", {**AUTOTUNE, "HOROVOD_AUTOTUNE_LOG": "a.csv"}),
    "--autotune-warmup-samples": (
        "2 --autotune",
        {**AUTOTUNE, "HOROVOD_AUTOTUNE_WARMUP_SAMPLES": "2"},
    ),
    "--autotune-steps-per-sample": (
        "4 --autotune",
        {**AUTOTUNE, "HOROVOD_AUTOTUNE_STEPS_PER_SAMPLE": "4"},
    ),
    "--autotune-bayes-opt-max-samples": (
        "5 --autotune",
        {**AUTOTUNE, "HOROVOD_AUTOTUNE_BAYES_OPT_MAX_SAMPLES": "5"},
    ),
    "--autotune-gaussian-process-noise": (
        "0.5 --autotune",
        {**AUTOTUNE, "HOROVOD_AUTOTUNE_GAUSSIAN_PROCESS_NOISE": "0.5"},
    ),
    "--timeline-filename": ("t.json", TIMELINE),
    "--timeline-mark-cycles": (
        "--timeline-filename t.json",
        {**TIMELINE, "HOROVOD_TIMELINE_MARK_CYCLES": "1"},
    ),
    "--no-timeline-mark-cycles": (
        "--timeline-filename t.json",
        {**TIMELINE, "HOROVOD_TIMELINE_MARK_CYCLES": "0"},
    ),
    "--no-stall-check": ("", {"HOROVOD_STALL_CHECK_DISABLE": "1"}),
    "--stall-check": ("", {"HOROVOD_STALL_CHECK_DISABLE": "0"}),
    "--stall-check-warning-time-seconds": ("9", {"HOROVOD_STALL_CHECK_TIME_SECONDS": "9"}),
    "--stall-check-shutdown-time-seconds": ("9", {"HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": "9"}),
    "--tcp": ("", {"NCCL_IB_DISABLE": "1"}),
    "--num-nccl-streams": ("2", {"HOROVOD_NUM_NCCL_STREAMS": "2"}),
    "--thread-affinity": ("1", {"HOROVOD_THREAD_AFFINITY": "1"}),
    "--gloo-timeout-seconds": ("60", {"HOROVOD_GLOO_TIMEOUT_SECONDS": "60"}),
    "--log-level": ("DEBUG", {"HOROVOD_LOG_LEVEL": "DEBUG"}),
    "--log-with-timestamp": ("", {"HOROVOD_LOG_HIDE_TIME": "0"}),
    "--log-without-timestamp": ("", {"HOROVOD_LOG_HIDE_TIME": "1"}),
    "--log-hide-timestamp": ("", {"HOROVOD_LOG_HIDE_TIME": "1"}),
    "--no-log-hide-timestamp": ("", {"HOROVOD_LOG_HIDE_TIME": "0"}),
    "--gloo": ("", {}),
    "--config-file": ("{config}", {"HOROVOD_CYCLE_TIME": "4", "HOROVOD_LOG_LEVEL": "INFO"}),
}


def options_of_horovodrun() -> dict[str, argparse.Action]:
    return {
        option: action
        for action in _parse([])[0]._actions
        for option in action.option_strings or [action.dest]
    }


def a_value_for(action: argparse.Action) -> list[str]:
    if action.nargs == 0:
        return []
    return ["3"] * (action.nargs if isinstance(action.nargs, int) else 1)


def test_every_option_of_horovodrun_is_accepted_or_refused_with_a_reason() -> None:
    options = options_of_horovodrun()
    refused = {option for option, action in options.items() if action.dest in REFUSED}
    assert len(options) > 60
    assert refused | set(ACCEPTED) == set(options)
    assert refused & set(ACCEPTED) == set()
    assert {action.dest for action in options.values()} >= set(REFUSED)


@pytest.mark.parametrize("option", ACCEPTED)
# some have been replaced long ago, and Horovod says so
@pytest.mark.filterwarnings("ignore:Argument --.*log-hide-timestamp:DeprecationWarning")
def test_an_accepted_option_becomes_what_horovodrun_makes_of_it(
    option: str, tmp_path: Path
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("params: {cycle_time_ms: 4}\nlogging: {level: INFO}\ncontroller: gloo\n")
    rest, environment = ACCEPTED[option]
    assert environment_of([option, *rest.format(config=config).split()]) == environment


def test_a_refused_option_says_why(capfd: pytest.CaptureFixture[str]) -> None:
    refused = {o: a for o, a in options_of_horovodrun().items() if a.dest in REFUSED}
    assert len(refused) > 30
    for option, action in refused.items():
        given = ["train.py"] if option == "command" else [option, *a_value_for(action)]
        with pytest.raises(ArgumentValueError) as caught:
            environment_of(given)
        assert REFUSED[action.dest] in str(caught.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ("--fusion-treshold-mb 32", "unrecognized arguments: --fusion-treshold-mb"),
        ("--fusion-threshold-mb much", "--fusion-threshold-mb: invalid int value: 'much'"),
        ("--fusion-threshold-mb", "--fusion-threshold-mb: expected 1 argument"),
        ("--fusion-threshold-mb -1", "fusion_threshold_mb=-1 must be >= 0"),
        ("--autotune --autotune-gaussian-process-noise 2", r"must be in \[0, 1\]"),
        ("--log-level loud", "--log-level: invalid choice: 'loud'"),
        ("--autotune --no-autotune", "--no-autotune: not allowed with argument --autotune"),
        ("--a", "ambiguous option: --a could match --autotune"),
        ("--timeline-mark-cycles", "without --timeline-filename"),
        ("--autotune-log-file a.csv", "ignores --autotune-log-file without --autotune"),
        ("--config-file /no/such.yaml", "--config-file .*No such file"),
        ("--cycle-time-ms '2", "No closing quotation"),
    ],
)
def test_what_horovods_parser_refuses_is_refused_in_its_words(
    options: str, text: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ArgumentValueError, match=f"(?s)^horovodrun_args.*{text}"):
        HorovodRunner(np=-1, horovodrun_args=options)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("controller: mpi", "'--mpi' makes no sense"),
        ("library_options: {mpi_threads_disable: true}", "never by MPI"),
        ("controller: smoke", "No such controller"),
        ("params: {cycle_time_ms: fast}", "--config-file names cannot be used: TypeError"),
        ("just text", "--config-file names cannot be used: AttributeError"),
        ("{", "--config-file names cannot be used: ParserError"),
    ],
)
def test_a_config_file_is_checked_in_the_same_way(tmp_path: Path, content: str, text: str) -> None:
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(ArgumentValueError, match=text):
        environment_of(["--config-file", str(tmp_path / "config.yaml")])


def test_the_drivers_own_command_line_is_neither_read_nor_changed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "--log-level", "loud"])
    parser = argparse.ArgumentParser
    assert environment_of(["--cycle-time-ms", "2"]) == {"HOROVOD_CYCLE_TIME": "2.0"}
    assert sys.argv == ["train.py", "--log-level", "loud"]
    assert argparse.ArgumentParser is parser


def test_a_driver_without_horovod_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "horovod.runner", None)
    with pytest.raises(ConfigurationError, match=r"(?s)horovodrun_args=.*HOROVOD_\.\.\. variables"):
        HorovodRunner(np=2, horovodrun_args=["--autotune"])


def test_options_reach_the_workers_and_win_over_the_drivers_variables(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOROVOD_CYCLE_TIME", "9")
    monkeypatch.setenv("HOROVOD_CACHE_CAPACITY", "5")

    def main() -> dict[str, str]:
        import os

        import horovod.torch as hvd
        import torch

        hvd.init()
        for _ in range(100):
            hvd.allreduce(torch.ones(2), name="g")
        return {name: value for name, value in os.environ.items() if name.startswith("HOROVOD_")}

    log = tmp_path / "autotune.csv"
    options = ["--cycle-time-ms", "2", "--log-level", "ERROR", "--autotune"]
    options += ["--autotune-log-file", str(log), "--autotune-steps-per-sample", "2"]
    found = HorovodRunner(np=-2, horovodrun_args=options).run(main)
    assert found["HOROVOD_CYCLE_TIME"] == "2.0"
    assert found["HOROVOD_CACHE_CAPACITY"] == "5"
    assert found["HOROVOD_LOG_LEVEL"] == "ERROR"
    header, *trials = log.read_text().splitlines()
    assert header.endswith("cycle_time_ms,tensor_fusion_threshold,score")
    assert {trial.split(",")[4] for trial in trials} == {"2"}
