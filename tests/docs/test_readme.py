"""What the README and its neighbours say works when it is typed in."""

from __future__ import annotations

import configparser
import os
import re
import sys
from pathlib import Path

import pytest

from tests import processes

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    page for folder in (".", "docs", "docs/adr") for page in (ROOT / folder).glob("*.md")
)
SCRIPT_SECONDS = 240


def code_blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def run_script(path: Path, environment: dict[str, str]) -> str:
    """Run a Python script and return its standard output; nothing of it outlives the call."""
    done = processes.run(
        [sys.executable, str(path)], cwd=path.parent, env=environment, capture_output=True
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.mark.spark
@pytest.mark.horovod
@pytest.mark.timeout(SCRIPT_SECONDS + 30)
@pytest.mark.parametrize("where", ["on Spark", "on this machine"])
def test_the_readmes_code_prints_what_is_shown(tmp_path: Path, where: str) -> None:
    readme = (ROOT / "README.md").read_text()
    [code], [shown] = code_blocks(readme, "python"), code_blocks(readme, "text")
    if where == "on Spark":
        session = 'SparkSession.builder.master("local[2]").getOrCreate()'
        code = f"from pyspark.sql import SparkSession\nspark = {session}\n{code}\nspark.stop()\n"
    else:
        assert "np=2" in code
        code = code.replace("np=2", "np=-2")
    script = tmp_path / "readme.py"
    script.write_text(code)
    out = run_script(script, {**os.environ, "PYSPARK_PYTHON": sys.executable})
    assert f"2 ranks {where}" in out
    for line in shown.splitlines():
        assert out.splitlines().count(line) == 1, out


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
class TestPage:
    def test_make_targets_exist(self, page: Path) -> None:
        makefile = (ROOT / "Makefile").read_text()
        targets = set(re.findall(r"^([a-z]+):(?!=)", makefile, re.MULTILINE))
        used = set(re.findall(r"(?:^|`)make ([a-z]+)", page.read_text(), re.MULTILINE))
        assert used <= targets
        if page.name == "README.md":
            assert used >= {"demo", "test"}

    def test_commands_of_the_package_exist(self, page: Path) -> None:
        shown = re.findall(r"python -m horovodrunner ([a-z-]+)", page.read_text())
        for command in set(shown):
            process = processes.run(
                [sys.executable, "-m", "horovodrunner", command, "--help"],
                capture_output=True,
            )
            assert process.returncode == 0, process.stderr
            for option in re.findall(rf"`{command} (--[a-z-]+)", page.read_text()):
                assert option in process.stdout

    def test_extras_exist(self, page: Path) -> None:
        config = configparser.ConfigParser()
        config.read(ROOT / "setup.cfg")
        extras = set(config["options.extras_require"])
        for names in re.findall(r"pip install '\.\[(.*?)\]'", page.read_text()):
            assert set(names.split(",")) <= extras

    def test_nothing_is_installed_from_an_index_that_does_not_have_it(self, page: Path) -> None:
        """horovodrunner itself comes from a checkout or a wheel: with a path."""
        installed = re.findall(r"pip install ([^`\n]*)", page.read_text())
        assert not [line for line in installed if re.search(r"(^|[\s'])horovodrunner\b", line)]

    def test_links_lead_somewhere(self, page: Path) -> None:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if not target.startswith("https://"):
                assert (page.parent / target).exists(), target

    def test_named_files_exist(self, page: Path) -> None:
        """Files are named from the root; decisions name those of their time."""
        if page.parent.name == "adr":
            pytest.skip("it is history")
        for name in re.findall(r"`([\w./-]+/[\w.-]+\.\w+)`", page.read_text()):
            places = (ROOT / name, ROOT / "horovodrunner" / name)
            assert any(place.exists() for place in places), name

    def test_lines_are_short(self, page: Path) -> None:
        """Tables and quoted output may be longer."""
        prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        long = [line for line in prose.splitlines() if len(line) > 110 and not line.startswith("|")]
        assert not long
