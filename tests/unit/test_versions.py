"""What is installed here and there."""

from __future__ import annotations

import platform

import cloudpickle

from horovodrunner.placement.versions import (
    differences,
    format_differences,
    installed_versions,
    must_fail,
)

DRIVER = {"Python": "3.11.7", "horovodrunner": "0.1.0", "torch": "2.13.0", "keras": ""}


def test_what_is_installed_is_read_without_importing() -> None:
    versions = installed_versions()
    assert versions["Python"] == platform.python_version()
    assert versions["cloudpickle"] == cloudpickle.__version__


def test_equal_versions_are_no_difference() -> None:
    assert differences(DRIVER, [("a", dict(DRIVER)), ("b", dict(DRIVER))]) == []


def test_what_one_side_lacks_is_no_difference() -> None:
    other = {**DRIVER, "torch": "", "keras": "3.15"}
    assert differences(DRIVER, [("a", other)]) == []


def test_other_versions_are_named_with_their_hosts_once() -> None:
    other = {**DRIVER, "torch": "2.12.1"}
    found = differences(DRIVER, [("a", dict(DRIVER)), ("b", other), ("b", other), ("c", other)])
    assert found == [("torch", "2.13.0", (("b", "2.12.1"), ("c", "2.12.1")))]
    assert not must_fail(found)
    assert format_differences(found).splitlines()[1].split() == [
        "torch",
        "2.13.0",
        "2.12.1",
        "(b),",
        "2.12.1",
        "(c)",
    ]


def test_executors_that_differ_from_each_other_are_named_when_the_driver_has_none() -> None:
    tasks = [(host, {**DRIVER, "keras": keras}) for host, keras in (("a", "3.14"), ("b", "3.15"))]
    found = differences(DRIVER, tasks)
    assert found == [("keras", "", (("a", "3.14"), ("b", "3.15")))]
    assert "keras            -             3.14 (a), 3.15 (b)" in format_differences(found)


def test_another_python_or_another_release_of_ours_cannot_work() -> None:
    def fails(**other: str) -> bool:
        return must_fail(differences(DRIVER, [("a", {**DRIVER, **other})]))

    assert fails(Python="3.12.1")
    assert not fails(Python="3.11.9")
    assert fails(horovodrunner="0.2.0")
