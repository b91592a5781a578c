"""The documentation builds without a warning and holds what it is there for."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import horovodrunner
from tests import processes

pytest.importorskip("sphinx")
pytest.importorskip("myst_parser")
pytest.importorskip("furo")

DOCS = Path(__file__).resolve().parents[2] / "docs"
BUILD_SECONDS = 150


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("docs")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html"]
    process = processes.run(
        [*command, "-d", str(target / "doctrees"), str(DOCS), str(target / "html")],
        capture_output=True,
    )
    assert process.returncode == 0, process.stderr
    return target / "html"


def test_every_page_is_built(html: Path) -> None:
    for page in DOCS.rglob("*.md"):
        name = page.relative_to(DOCS).with_suffix(".html")
        assert (html / name).exists() == (page.name != "0000-template.md"), name


def test_every_public_name_is_described(html: Path) -> None:
    api = (html / "api.html").read_text()
    for name in horovodrunner.__all__:
        assert f'id="horovodrunner.{name}"' in api, name


def test_the_figure_is_in_the_page(html: Path) -> None:
    page = (html / "how-it-works.html").read_text()
    assert '<svg xmlns="http://www.w3.org/2000/svg" id="three-processes"' in page


def test_the_error_tree_is_the_one_of_the_code() -> None:
    drawn = (horovodrunner.errors.__doc__ or "").split("::\n", 1)[1]
    tree = [line.removeprefix("    ") for line in drawn.splitlines() if line.startswith("    ")]
    assert "\n".join(tree) in (DOCS / "errors.md").read_text()


def test_every_decision_is_listed() -> None:
    listed = (DOCS / "decisions.md").read_text().splitlines()
    for page in (DOCS / "adr").glob("*.md"):
        assert (f"adr/{page.stem}" in listed) == (page.stem != "0000-template"), page.name
