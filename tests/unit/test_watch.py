"""What a worker sees of its own main thread."""

from __future__ import annotations

import threading
import types
import weakref
from collections.abc import Callable
from typing import Any

from horovodrunner.processes.worker.watch import MainThreadWatch
from horovodrunner.wire.events import Beat


def module(name: str, source: str, **names: Any) -> Any:
    """Make a module that is not there, such as one of Horovod's."""
    made = types.ModuleType(name)
    vars(made).update(names)
    exec(compile(source, f"{name}.py", "exec"), vars(made))
    return made


HOROVOD = """
def allreduce(then):
    synchronize(then)

def synchronize(then):
    then()
"""


def of_horovod(function: str) -> Any:
    ops = module("horovod.torch.mpi_ops", HOROVOD)
    return getattr(ops, function)


def sampled_in(call: Callable[[Callable[[], None]], None], samples: int = 2) -> Beat:
    """Return the last sample taken while the innermost frames are a library's."""
    watch = MainThreadWatch()
    wait, go = threading.Event(), threading.Event()
    found: list[Beat] = []

    def sampler() -> None:
        go.wait(10)
        found.extend(watch.sample(0) for _ in range(samples))
        wait.set()

    thread = threading.Thread(target=sampler)
    thread.start()
    namespace = {"go": go, "wait": wait}
    block = module("torch.inner", "def inner():\n    go.set()\n    wait.wait(10)\n", **namespace)
    call(block.inner)
    thread.join()
    return found[-1]


def test_the_collective_is_the_function_the_user_called() -> None:
    def train(then: Callable[[], None]) -> None:
        of_horovod("allreduce")(then)

    sample = sampled_in(train)
    assert sample.waits_in == "allreduce"
    assert sample.surely
    assert sample.where.endswith("in train")
    assert __file__ in sample.where


def test_a_collective_through_an_autograd_function_keeps_its_name() -> None:
    """HorovodAllreduce.apply goes through torch."""
    through = module("torch.autograd.function", "def apply(f, then):\n    f(then)\n")
    source = "def allreduce(then):\n    apply(synchronize, then)\n"
    names = {"apply": through.apply, "synchronize": of_horovod("synchronize")}
    outer = module("horovod.torch.mpi_ops", source, **names)
    assert sampled_in(outer.allreduce).waits_in == "allreduce"


def test_the_users_code_under_a_frame_of_horovods_is_no_collective() -> None:
    """hvd.elastic.run's wrapper stays on the stack as long as training goes on."""
    wrapper = module("horovod.common.elastic", "def wrapper(then):\n    then()\n").wrapper

    def train(then: Callable[[], None]) -> None:
        def user_code() -> None:
            then()

        wrapper(user_code)

    assert sampled_in(train).waits_in == ""


def test_a_call_that_goes_on_is_timed_and_a_new_one_starts_at_zero() -> None:
    watch = MainThreadWatch()
    seconds: list[float] = []

    def one_call(samples: int) -> None:
        def from_elsewhere() -> None:
            go.wait(10)
            for _ in range(samples):
                seconds.append(watch.sample(0).seconds)
                pause.wait(0.05)
            done.set()

        go, pause, done = threading.Event(), threading.Event(), threading.Event()
        thread = threading.Thread(target=from_elsewhere)
        source = "def inner():\n    go.set()\n    done.wait(10)\n"
        block = module("torch.inner", source, go=go, done=done)
        thread.start()
        of_horovod("synchronize")(block.inner)
        thread.join()

    one_call(3)
    assert seconds[2] >= 0.1
    one_call(1)
    assert seconds[3] < seconds[2]


def test_a_tensorflow_step_may_be_computing() -> None:
    step = module(
        "tensorflow.python.eager.execute",
        "def quick_execute():\n    go.set()\n    wait.wait(10)\n",
    )

    def call(inner: Callable[[], None]) -> None:
        vars(step).update({name: inner.__globals__[name] for name in ("go", "wait")})
        step.quick_execute()

    sample = sampled_in(call)
    assert (sample.waits_in, sample.surely) == ("a TensorFlow step", False)


def test_frames_are_not_kept_after_the_call() -> None:
    watch = MainThreadWatch()

    class Large:
        pass

    references: list[weakref.ref[Large]] = []

    def call() -> None:
        large = Large()
        references.append(weakref.ref(large))
        thread = threading.Thread(target=watch.sample, args=[0])
        thread.start()
        thread.join()

    call()
    watch.sample(0)
    assert references[0]() is None
