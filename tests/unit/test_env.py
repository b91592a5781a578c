"""Environment variables."""

import json

from horovodrunner.placement.environment import (
    forwarded_environment,
    hash_seed,
    slot_environment,
    tf_config,
    torchrun_environment,
    worker_base_environment,
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
    from dataclasses import replace

    assert "CUDA_VISIBLE_DEVICES" not in variables(slot=replace(SLOT, devices=None))


def test_torchs_gloo_takes_the_same_interface_unless_the_user_names_another() -> None:
    assert variables()["GLOO_SOCKET_IFNAME"] == "eth1"
    assert variables({"HOROVOD_GLOO_IFACE": "ib0"})["GLOO_SOCKET_IFNAME"] == "ib0"
    own = forwarded_environment({"GLOO_SOCKET_IFNAME": "ib1", "GLOO_X": "1"})
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
