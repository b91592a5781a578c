"""Manifests are read back as written, and what is malformed is refused with the reason."""

from __future__ import annotations

import json
from typing import Any

import pytest

from horovodrunner.flows.checkpoints.manifest import Manifest, StoredFile, safe_path

SHA = "0" * 63 + "f"
MANIFEST = Manifest(
    step=12,
    sequence=3,
    saved_at="2026-02-03T04:05:06+00:00",
    files=(StoredFile("model.pt", 10, SHA), StoredFile("variables/é\udcff", 0, SHA)),
    directories=("assets",),
)


def changed(**fields: Any) -> str:
    """The manifest with other fields; None removes one."""
    content = {**json.loads(MANIFEST.to_json()), **fields}
    return json.dumps({key: value for key, value in content.items() if value is not None})


def test_a_manifest_is_read_back_equal() -> None:
    text = MANIFEST.to_json()
    assert Manifest.from_json(text) == MANIFEST
    assert Manifest.from_json(text.encode().decode()).size == 10
    assert len(text.splitlines()) > 10
    assert json.loads(text)["format"] == 1


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not JSON"),
        (MANIFEST.to_json()[:-20], "not JSON"),
        ("[" * 200_000, "not JSON"),
        ("[]", "not of type dict"),
        (changed(format=2), "format is 2"),
        (changed(format=True), "format is True"),
        (changed(format=None), "format is None"),
        (changed(step=None), "'step' is not in it"),
        (changed(step="12"), "'step' is '12', not of type int"),
        (changed(step=True), "'step' is True"),
        (changed(step=-1), "'step' is -1"),
        (changed(sequence=-1), "'sequence' is -1"),
        (changed(sequence=1.0), "'sequence' is 1.0"),
        (changed(saved_at=1), "'saved_at' is 1"),
        (changed(saved_at="yesterday"), "'saved_at' is no time"),
        (changed(saved_at="2026-02-03T04:05:06+01:00"), "not in UTC"),
        (changed(saved_at="2026-02-03T04:05:06"), "not in UTC"),
        (changed(files={}), "'files' is {}"),
        (changed(files=["a"]), "a file is 'a'"),
        (changed(files=[{"path": "a", "sha256": SHA}]), "'size' is not in it"),
        (changed(files=[{"path": "a", "size": -1, "sha256": SHA}]), "'size' is -1"),
        (changed(files=[{"path": "a", "size": 1, "sha256": SHA.upper()}]), "64 hexadecimal"),
        (changed(files=[{"path": "a", "size": 1, "sha256": SHA + "\n"}]), "64 hexadecimal"),
        (changed(files=[{"path": "../a", "size": 1, "sha256": SHA}]), "'../a' is not safe"),
        (changed(files=[{"path": "a", "size": 1, "sha256": SHA}] * 2), "'a' is in it twice"),
        (changed(files=[{"path": "assets/a/b", "size": 1, "sha256": SHA}] * 2), "twice"),
        (changed(directories=["model.pt"]), "'model.pt' is in it twice"),
        (changed(directories=["model.pt/a"]), "'model.pt' is a file and a directory"),
        (changed(directories=["/etc"]), "'/etc' is not safe"),
        (changed(directories=[1]), "a directory is 1"),
    ],
)
def test_what_is_malformed_is_refused_with_the_reason(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        Manifest.from_json(text)
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    "path",
    ["", "/", "/etc/passwd", "..", "a/../../b", ".", "./a", "a/.", "a//b", "a/", "a\\b", "a\0b"],
)
def test_unsafe_paths_are_refused(path: str) -> None:
    with pytest.raises(ValueError, match="not safe"):
        safe_path(path)


@pytest.mark.parametrize("path", ["manifest.json", "manifest.json/a"])
def test_the_manifest_itself_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match="taken"):
        safe_path(path)


@pytest.mark.parametrize("path", ["a", "a/manifest.json", "..a/b..", "C:/x", "a b/*é"])
def test_other_paths_are_safe(path: str) -> None:
    assert safe_path(path) == path
