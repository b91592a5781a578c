"""Results made ahead: in order, bounded, and ended whatever happens."""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from horovodrunner.prefetch import Prefetcher, map_in_threads, read_ahead
from tests import processes
from tests.waiting import wait_until


def running() -> list[threading.Thread]:
    return [each for each in threading.enumerate() if each.name == "horovodrunner-prefetch"]


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_results_come_in_order_however_long_each_takes(threads: int) -> None:
    later = threading.Event()

    def square(number: int) -> int:
        if number == 0 and threads > 1:
            assert later.wait(60)
        if number == 1:
            later.set()
        return number * number

    assert list(map_in_threads(square, range(20), threads)) == [n * n for n in range(20)]
    assert running() == []


@pytest.mark.parametrize("count", [0, 1, 2, 3, 10])
def test_a_thread_reads_all_there_is(count: int) -> None:
    with read_ahead(range(count), ahead=2) as numbers:
        assert list(numbers) == list(range(count))
        assert list(numbers) == []


def test_only_so_many_are_made_ahead() -> None:
    made: list[int] = []
    with Prefetcher(made.append, range(100), ahead=3) as results:
        wait_until(lambda: len(made) == 3)
        next(results)
        wait_until(lambda: len(made) == 4)
        next(results)
        wait_until(lambda: len(made) == 5)
    assert made == list(range(5))


def test_an_error_is_raised_in_the_place_of_its_result() -> None:
    with Prefetcher(lambda n: 1 // (n - 2), range(5), ahead=4, threads=2) as results:
        assert [next(results), next(results)] == [-1, -1]
        with pytest.raises(ZeroDivisionError):
            next(results)
        assert list(results) == [1, 0]


@pytest.mark.parametrize("threads", [0, 2])
def test_a_function_that_raises_stop_iteration_does_not_end_the_results(threads: int) -> None:
    with pytest.raises(RuntimeError, match="raised StopIteration"):
        list(map_in_threads(next, [iter([1]), iter(())], threads))


def test_an_error_of_what_is_read_comes_after_what_was_read() -> None:
    def fail() -> Iterator[int]:
        yield 1
        raise OSError("gone")

    with read_ahead(fail(), ahead=5) as items:
        assert next(items) == 1
        with pytest.raises(OSError, match="gone"):
            next(items)


def test_leaving_ends_a_thread_that_has_more_to_read() -> None:
    with read_ahead(iter(int, 1), ahead=2) as zeros:
        assert next(zeros) == 0
    wait_until(lambda: running() == [])
    assert list(zeros) == []


def test_leaving_does_not_wait_for_what_is_read() -> None:
    goes_on = threading.Event()

    def wait() -> Iterator[int]:
        assert goes_on.wait(60)
        yield 1

    with read_ahead(wait(), ahead=1):
        pass
    assert len(running()) == 1
    goes_on.set()
    wait_until(lambda: running() == [])


def test_what_is_dropped_ends_its_threads() -> None:
    results = map_in_threads(str, range(100), threads=3)
    assert next(results) == "0"
    assert len(running()) == 3
    del results
    assert running() == []


def test_neither_an_item_nor_a_result_is_held_when_it_was_taken() -> None:
    class Item:
        living = 0

        def __init__(self) -> None:
            type(self).living += 1

        def __del__(self) -> None:
            type(self).living -= 1

    made: list[Any] = []

    def function(_: Item) -> Item:
        made.append(None)
        return Item()

    def holds(number: int) -> bool:
        return len(made) == number and Item.living == 2

    with Prefetcher(function, (Item() for _ in range(9)), ahead=2) as results:
        for number in range(3, 6):
            next(results)
            wait_until(functools.partial(holds, number))


INTERRUPTS = """
import random, signal, threading
from horovodrunner.prefetch import Prefetcher

signal.signal(signal.SIGALRM, signal.default_int_handler)
interrupted = 0
while interrupted < 1500:
    try:
        with Prefetcher(abs, iter(int, 1), ahead=2, threads=2) as numbers:
            signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-5, 2e-4))
            try:
                for number in numbers:
                    pass
            except KeyboardInterrupt:
                interrupted += 1
    except KeyboardInterrupt:
        pass
"""


def test_an_interrupt_at_any_place_leaves_nothing_locked() -> None:
    assert processes.run([sys.executable, "-c", INTERRUPTS]).returncode == 0


UNFINISHED = """
import time
from horovodrunner.prefetch import map_in_threads, read_ahead

def forever():
    time.sleep(3600)
    yield

results = map_in_threads(str, range(100), threads=3)
next(results)
waiting = read_ahead(forever(), ahead=1)
"""


def test_a_process_ends_with_results_that_nobody_took() -> None:
    assert processes.run([sys.executable, "-c", UNFINISHED]).returncode == 0
