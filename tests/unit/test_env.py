"""Environment variables."""

import dataclasses
import json
import os
from typing import Any

import pytest

from horovodrunner import ArgumentTypeError, ArgumentValueError, ConfigurationError
from horovodrunner.placement import environment as names
from horovodrunner.placement.environment import (
    hash_seed,
    slot_environment,
    tf_config,
    torchrun_environment,
    worker_base_environment,
)
from horovodrunner.placement.forwarding import (
    FRAMEWORK_PREFIXES,
    checked_patterns,
    checked_variables,
    forwarded_environment,
    named_by,
    set_by_run,
)
from horovodrunner.placement.topology import Slot

SLOT = Slot(
    partition=3, rank=5, size=8, local_rank=1, local_size=4, cross_rank=2, cross_size=3,
    host_index=2, host="node", host_id="node-1", address="10.0.0.2", interface="eth1",
    devices="2,3",
)  # fmt: skip


def variables(forwarded: dict[str, str] | None = None, slot: Slot = SLOT) -> dict[str, str]:
    return slot_environment(slot, ("10.0.0.1", 4000), ("10.0.0.1", 5000), forwarded or {})


def test_the_documented_prefixes_travel_and_nothing_else() -> None:
    names = ["HOROVOD_X", "NCCL_X", "OMP_X", "CUDA_X", "TF_X", "MLFLOW_X"]
    names += ["KERAS_BACKEND", "HOROVODRUNNER_KERAS"]
    others = ["KERAS_HOME", "HOME", "AWS_SECRET_ACCESS_KEY", "XHOROVOD_", "SPARK_X"]
    assert forwarded_environment(dict.fromkeys(names + others, "1")) == dict.fromkeys(names, "1")


@pytest.mark.parametrize("prefix", FRAMEWORK_PREFIXES)
def test_what_frameworks_are_told_travels_unless_it_names_a_place_here(prefix: str) -> None:
    travels = {f"{prefix}MODE": "offline", f"{prefix}CACHE_DIR": "gs://bucket/cache"}
    stays = {
        f"{prefix}A": "/home/me/x",
        f"{prefix}B": "~/x",
        f"{prefix}CACHE_DIR": "cache",
        f"{prefix}HOME": "here",
    }
    assert forwarded_environment(travels) == travels
    assert forwarded_environment(stays) == {}
    assert forwarded_environment(stays, [f"{prefix}*"]) == stays


@pytest.mark.parametrize(
    "name",
    [
        *("JAX_COORDINATOR_ADDRESS", "JAX_PROCESS_ID", "JAX_NUM_PROCESSES", "WANDB_SERVICE"),
        *("JAX_CUDA_VISIBLE_DEVICES", "OPENBLAS_CORETYPE", "TORCHELASTIC_RUN_ID"),
        *("PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "PYTHONINSPECT", "PYTHONEXECUTABLE"),
        *(
            "PYTHONPYCACHEPREFIX",
            "PYTHONUSERBASE",
            "PYTHON_GIL",
            "PYTHON_VERSION",
            "PYTHONNOUSERSITE",
        ),
        *("HOROVOD_RANK", "HOROVOD_SIZE", "HOROVOD_GLOO_RENDEZVOUS_ADDR", "RANK", "MASTER_PORT"),
    ],
)
def test_what_describes_one_process_or_machine_stays(name: str) -> None:
    assert forwarded_environment({name: "1"}) == {}


def test_of_pythons_own_variables_those_travel_that_change_what_code_does() -> None:
    own = dict.fromkeys(["PYTHONOPTIMIZE", "PYTHONWARNINGS", "PYTHONFAULTHANDLER"], "1")
    assert forwarded_environment(own) == own


def test_of_xlas_flags_those_stay_that_name_a_directory() -> None:
    flags = "--xla_force_host_platform_device_count=4 --xla_gpu_cuda_data_dir=/usr/local/cuda"
    given = forwarded_environment({"XLA_FLAGS": flags})
    assert given == {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    assert forwarded_environment({"XLA_FLAGS": "--xla_dump_to=/tmp/x"}) == {}
    assert forwarded_environment({"XLA_FLAGS": "flags.txt"}) == {}


def test_patterns_name_what_travels_beside_it() -> None:
    driver = {"AWS_REGION": "eu", "MY_TOKEN": "t", "aws_x": "1", "PYTHONPATH": "/x", "RANK": "7"}
    driver["PYSPARK_GATEWAY_SECRET"] = "s"
    assert forwarded_environment(driver, ["AWS_*", "MY_TOKEN"]) == {
        "AWS_REGION": "eu",
        "MY_TOKEN": "t",
    }
    assert forwarded_environment(driver, ["P*", "RAN?", "[xM]Y_*"]) == {"MY_TOKEN": "t"}
    assert named_by(["AWS_*", "NOTHING_*"], driver) == {"AWS_REGION"}


@pytest.mark.parametrize("pattern", ["*", "**", "?*", "*?", "[!x]*", "*[A-Z_]*", "[A-Z]*", "[!_]*"])
def test_a_pattern_that_takes_everything_is_refused(pattern: str) -> None:
    with pytest.raises(ArgumentValueError, match="every secret of its shell"):
        checked_patterns("forward", [pattern])


def test_patterns_that_take_everything_together_are_refused() -> None:
    with pytest.raises(ArgumentValueError, match=r"\['\[A-M\]\*', '\[N-Z\]\*'\] would take along"):
        checked_patterns("forward", ["[A-M]*", "MY_TOKEN", "[N-Z]*"])
    named = ["PATH", "HOME", "PWD", "JAVA_HOME", "AWS_*"]
    assert checked_patterns("forward", named) == tuple(named)


@pytest.mark.parametrize("pattern", ["", "A=1", "A\0", " AWS_*", "\ud800", "RANK", "PYTHONPATH"])
def test_a_pattern_that_cannot_work_is_refused(pattern: str) -> None:
    with pytest.raises(ArgumentValueError, match="forward has"):
        checked_patterns("forward", [pattern])


def test_everything_that_the_run_sets_is_refused_by_name() -> None:
    user_wins = {"HOROVOD_GLOO_IFACE", "HOROVOD_GLOO_PORTS", "NCCL_SOCKET_IFNAME"}
    user_wins |= {"GLOO_SOCKET_IFNAME", "CUDA_VISIBLE_DEVICES"}
    ours = {
        *slot_environment(SLOT, ("a", 1), ("a", 2), {}, (1, 2)),
        *torchrun_environment(SLOT, 1, "x", 1),
        *tf_config(["a:1"], 0),
        *(names.DATA_DIRECTORY, names.IMPORT_PATH, names.MAIN_NAMES, names.MLFLOW),
    }
    assert user_wins < ours
    for name in ours - user_wins:
        assert set_by_run(name) is not None
        with pytest.raises(ArgumentValueError, match=f"environment has {name}, which the run"):
            checked_variables("environment", {name: "1"})
    for name in user_wins:
        assert checked_variables("environment", {name: "1"}) == {name: "1"}


@pytest.mark.parametrize(
    ("given", "kind", "text"),
    [
        (["A=1"], ArgumentTypeError, "environment is a list"),
        ("A=1", ArgumentTypeError, "environment is a str"),
        ({1: "x"}, ArgumentTypeError, "the name 1 is no str"),
        ({"A": 3}, ArgumentTypeError, r"environment\['A'\]: it must be a str, or None to"),
        ({"A": True}, ArgumentTypeError, "got bool"),
        ({"A": b"hunter2"}, ArgumentTypeError, "got bytes"),
        ({"": "x"}, ArgumentValueError, "cannot be the name"),
        ({"A=B": "x"}, ArgumentValueError, "cannot be the name"),
        ({"A\0": "x"}, ArgumentValueError, "cannot be the name"),
        ({" A": "x"}, ArgumentValueError, "no space"),
        ({"A": "hunter2\0"}, ArgumentValueError, "has a NUL"),
        ({"A": "hunter2\ud800"}, ArgumentValueError, "at character 7"),
        ({"A\ud800": "x"}, ArgumentValueError, "that cannot be written as bytes"),
        ({"A\ud800": None}, ArgumentValueError, "that cannot be written as bytes"),
        (
            {f"V{number}": "x" * 100_000 for number in range(os.sysconf("SC_ARG_MAX") // 100_000)},
            ArgumentValueError,
            "variables, and Linux starts no process with more than",
        ),
        ({"PYTHONHASHSEED": "a"}, ConfigurationError, r"set environment\['PYTHONHASHSEED'\] to"),
        ({"A": "x" * 131072}, ArgumentValueError, "pass it as an argument of main"),
        ({"PYTHONPATH": "/x"}, ArgumentValueError, "sys.path"),
        ({"RANK": None}, ArgumentValueError, "environment has RANK"),
        ({"PYTHONHASHSEED": "-1"}, ConfigurationError, "lets no Python process start"),
    ],
)
def test_variables_that_cannot_be_are_refused(given: Any, kind: Any, text: str) -> None:
    with pytest.raises(kind, match=text) as caught:
        checked_variables("environment", given)
    assert "hunter2" not in str(caught.value)


def test_the_largest_value_that_a_process_can_have_is_taken() -> None:
    value = "x" * (131072 - len("A=") - 1)
    assert checked_variables("environment", {"A": value}) == {"A": value}


def test_a_variable_that_is_removed_comes_from_nowhere_and_the_runs_own_stays() -> None:
    own = {"A": "executor", "OMP_NUM_THREADS": "7", "PYTHONHASHSEED": "5"}
    forwarded = {"B": "driver", "OMP_NUM_THREADS": "9"}
    removed = ["A", "B", "OMP_NUM_THREADS", "PYTHONHASHSEED"]
    given = worker_base_environment(own, forwarded, [], cores=2, removed=removed)
    assert not {"A", "B"} & set(given)
    assert (given["OMP_NUM_THREADS"], given["PYTHONHASHSEED"]) == ("2", "0")


def test_a_hash_seed_that_python_takes_is_taken() -> None:
    for value in ("007", " 7", "+7"):
        assert hash_seed({"PYTHONHASHSEED": value}) == {"PYTHONHASHSEED": value}


def test_a_slot_in_horovods_words_and_in_torchruns() -> None:
    given = variables()
    expected = {
        "HOROVOD_RANK": "5", "HOROVOD_SIZE": "8", "HOROVOD_LOCAL_RANK": "1",
        "HOROVOD_LOCAL_SIZE": "4", "HOROVOD_CROSS_RANK": "2", "HOROVOD_CROSS_SIZE": "3",
        "HOROVOD_GLOO_RENDEZVOUS_ADDR": "10.0.0.1", "HOROVOD_GLOO_RENDEZVOUS_PORT": "4000",
        "HOROVOD_GLOO_IFACE": "eth1", "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "2", "MASTER_ADDR": "10.0.0.1",
        "MASTER_PORT": "5000", "CUDA_VISIBLE_DEVICES": "2,3",
    }  # fmt: skip
    assert {name: given[name] for name in expected} == expected


def test_an_interface_the_user_named_is_kept() -> None:
    given = variables({"NCCL_SOCKET_IFNAME": "ib0"})
    assert "NCCL_SOCKET_IFNAME" not in given
    assert given["HOROVOD_GLOO_IFACE"] == "eth1"


def test_without_gpus_the_variable_is_left_alone() -> None:
    without = dataclasses.replace(SLOT, devices=None)
    assert "CUDA_VISIBLE_DEVICES" not in variables(slot=without)


def test_torchs_gloo_takes_the_same_interface_unless_the_user_names_another() -> None:
    assert variables()["GLOO_SOCKET_IFNAME"] == "eth1"
    assert variables({"HOROVOD_GLOO_IFACE": "ib0"})["GLOO_SOCKET_IFNAME"] == "ib0"
    own = forwarded_environment({"GLOO_SOCKET_IFNAME": "ib1"})
    assert own == {"GLOO_SOCKET_IFNAME": "ib1"}
    assert "GLOO_SOCKET_IFNAME" not in variables(own)


def test_a_process_that_torchrun_started() -> None:
    given = torchrun_environment(SLOT, hosts=3, run_id="ab-2", attempt=2)
    assert given == {
        "GROUP_WORLD_SIZE": "3", "ROLE_NAME": "default", "ROLE_RANK": "5", "ROLE_WORLD_SIZE": "8",
        "TORCHELASTIC_RUN_ID": "ab-2", "TORCHELASTIC_RESTART_COUNT": "1",
    }  # fmt: skip


def test_tensorflows_variable_is_every_ranks_own() -> None:
    config = json.loads(tf_config(["10.0.0.1:4000", "10.0.0.2:4000"], 1)["TF_CONFIG"])
    assert config["cluster"] == {"worker": ["10.0.0.1:4000", "10.0.0.2:4000"]}
    assert config["task"] == {"type": "worker", "index": 1}
    assert tf_config([], 1) == {}


def test_another_processs_tf_config_does_not_reach_the_workers() -> None:
    assert forwarded_environment({"TF_CONFIG": "{}", "TF_X": "1"}) == {"TF_X": "1"}
    assert "TF_CONFIG" not in worker_base_environment({"TF_CONFIG": "{}"}, {}, [], cores=1)


def test_workers_do_not_get_sparks_secrets() -> None:
    own = {"PYTHON_WORKER_FACTORY_SECRET": "s", "HOME": "/h", "OMP_NUM_THREADS": "8"}
    given = worker_base_environment(own, {"OMP_NUM_THREADS": "2"}, ["/a", "/b"], cores=8)
    threads = {"OMP_NUM_THREADS": "2", "TF_NUM_INTRAOP_THREADS": "2"}
    path = {"HOROVODRUNNER_IMPORT_PATH": '["/a", "/b"]'}
    assert given == {"HOME": "/h", "PYTHONHASHSEED": "0", **path, **threads}


def test_without_the_users_word_threads_are_the_workers_cores() -> None:
    given = worker_base_environment({}, {}, [], cores=4)
    assert (given["OMP_NUM_THREADS"], given["TF_NUM_INTRAOP_THREADS"]) == ("4", "4")
    assert worker_base_environment({}, {}, [], cores=0)["OMP_NUM_THREADS"] == "1"


def test_the_users_numbers_of_threads_are_kept() -> None:
    own = {"OMP_NUM_THREADS": "3", "TF_NUM_INTRAOP_THREADS": "2"}
    given = worker_base_environment(own, {}, [], cores=8)
    assert (given["OMP_NUM_THREADS"], given["TF_NUM_INTRAOP_THREADS"]) == ("3", "2")


def test_gloo_listens_at_the_address_that_was_gathered_and_in_the_range() -> None:
    given = slot_environment(SLOT, ("10.0.0.1", 4000), ("10.0.0.1", 5000), {}, (4000, 4099))
    assert given["HOROVOD_GLOO_ADDRESS"] == "10.0.0.2"
    assert given["HOROVOD_GLOO_PORTS"] == "4000-4099"
    assert "HOROVOD_GLOO_PORTS" not in variables()


def test_without_a_rendezvous_nothing_names_one() -> None:
    given = slot_environment(SLOT, ("10.0.0.1", 0), ("10.0.0.1", 5000), {})
    assert not [name for name in given if "RENDEZVOUS" in name]


def test_the_address_goes_when_the_user_named_another_interface() -> None:
    given = variables({"HOROVOD_GLOO_IFACE": "ib0"})
    assert not {"HOROVOD_GLOO_IFACE", "HOROVOD_GLOO_ADDRESS"} & set(given)
    assert given["NCCL_SOCKET_IFNAME"] == "eth1"
    assert variables({"HOROVOD_GLOO_IFACE": "eth1"})["HOROVOD_GLOO_ADDRESS"] == "10.0.0.2"
