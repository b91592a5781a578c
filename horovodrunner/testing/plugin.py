"""The pytest plugin: fixtures, markers and options. Runs in: the driver.

pytest loads this file in every session, so it imports nothing until a fixture is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from horovodrunner.testing.clusters import Clusters, Shape
    from horovodrunner.testing.faults import Faults

LEAKS = "horovodrunner_leaks"
_PRESENT = pytest.StashKey["dict[object, str]"]()
"""What there is before a test: see horovodrunner.testing.leaks."""

_INI = {
    "executors": "executors of the fixtures spark_cluster and spark_connect_cluster (2)",
    "cores": "cores of each executor (1)",
    "memory": "memory of each executor in MiB (1024)",
    "gpus_per_executor": "simulated GPUs of each executor (0)",
}
_PREFIX = "spark_cluster_"
_SCOPES = ("function", "class", "module", "package", "session")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option for leaks, and what an ini file may say of clusters."""
    group = parser.getgroup("horovodrunner", "training code on real ranks (horovodrunner)")
    group.addoption(
        "--horovodrunner-leaks",
        action="store_true",
        dest=LEAKS,
        help="fail a test that leaves processes, threads, ports or files of a run behind, and "
        "end its processes",
    )
    for name, text in _INI.items():
        parser.addini(_PREFIX + name, text)
    parser.addini(_PREFIX + "confs", "settings of Spark, name=value, one a line", type="linelist")
    parser.addini(
        _PREFIX + "scope",
        "scope of spark_cluster and spark_connect_cluster: function, or a wider one, such as "
        "session, for fixtures that have it, too; markers count with function alone",
        default="function",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Describe the markers."""
    config.addinivalue_line(
        "markers",
        "spark_cluster(executors=2, cores=1, memory=1024, gpus_per_executor=0, confs={}): what "
        "the fixtures spark_cluster and spark_connect_cluster have for this test",
    )
    config.addinivalue_line(
        "markers",
        f"{LEAKS}: fail if this test leaves processes, threads, ports or files of a run behind",
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Any:
    """Look what there is before the test, where that is wanted."""
    if item.config.getoption(LEAKS) or item.get_closest_marker(LEAKS):
        from horovodrunner.testing import leaks

        item.stash[_PRESENT] = leaks.present()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Any:
    """Look what it has left behind, when its fixtures have cleaned up."""
    try:
        result = yield
    except BaseException:
        if left := _left_behind(item):
            item.add_report_section("teardown", "left behind", "\n".join(left))
        raise
    if left := _left_behind(item):
        pytest.fail(f"left behind: {', '.join(left)}", pytrace=False)
    return result


def _left_behind(item: pytest.Item) -> list[str]:
    before = item.stash.get(_PRESENT, None)
    if before is None:
        return []
    from horovodrunner.testing import leaks

    del item.stash[_PRESENT]
    return leaks.end_what_is_left(before)


@pytest.fixture(scope="session")
def _spark_clusters() -> Iterator[Clusters]:
    from horovodrunner.testing.clusters import Clusters

    clusters = Clusters()
    yield clusters
    clusters.close()


def _cluster_scope(fixture_name: str, config: pytest.Config) -> Any:
    scope = config.getini(_PREFIX + "scope")
    if scope not in _SCOPES:
        raise pytest.UsageError(f"{_PREFIX}scope = {scope}: it is one of {', '.join(_SCOPES)}")
    return scope


def _shape(request: pytest.FixtureRequest) -> Shape:
    """Return what the ini file and the closest marker say of the cluster."""
    from horovodrunner.testing.clusters import Shape

    given: dict[str, Any] = {}
    for name in _INI:
        if text := request.config.getini(_PREFIX + name):
            if not text.strip().isdecimal():
                raise pytest.UsageError(f"{_PREFIX}{name} = {text}: give a whole number")
            given[name] = int(text)
    confs = {}
    for line in request.config.getini(_PREFIX + "confs"):
        name, equals, value = line.partition("=")
        if not equals:
            raise pytest.UsageError(f"{_PREFIX}confs has the line {line!r}: write name=value")
        confs[name.strip()] = value.strip()
    marker = request.node.get_closest_marker("spark_cluster")
    if marker is not None:
        if marker.args:
            raise pytest.UsageError(
                f"spark_cluster{marker.args}: give names, spark_cluster(executors=2, cores=1)"
            )
        given |= marker.kwargs
    of_marker = given.pop("confs", {})
    if isinstance(of_marker, dict):
        of_marker = {**confs, **of_marker}
    return Shape.of(**given, confs=of_marker)


@pytest.fixture(scope=_cluster_scope)
def spark_cluster(request: pytest.FixtureRequest, _spark_clusters: Clusters) -> Any:
    """Return a SparkSession on real executors: two of one core, if no marker says otherwise.

    Tests that want the same cluster share it, and its JVM.
    """
    return _spark_clusters.session(_shape(request))


@pytest.fixture(scope=_cluster_scope)
def spark_connect_cluster(request: pytest.FixtureRequest, _spark_clusters: Clusters) -> Any:
    """Return a Spark Connect session, whose server has real executors."""
    return _spark_clusters.connect(_shape(request))


@pytest.fixture
def simulated_gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[str]]:
    """Return what lets runs with np < 0 find so many GPUs; on Spark the marker does it."""
    from horovodrunner import validation as checked

    def simulate(number: int) -> list[str]:
        names = [str(each) for each in range(checked.integer("number", number, at_least=0))]
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(names))
        return names

    return simulate


@pytest.fixture
def horovod_runner(request: pytest.FixtureRequest) -> Any:
    """Return what makes a HorovodRunner, with all output of its ranks in the report."""
    from horovodrunner import HorovodRunner

    def make(**options: Any) -> HorovodRunner:
        return HorovodRunner(
            **{"np": -2, "driver_log_verbosity": "all", "progress": False, **options}
        )

    return make


@pytest.fixture
def run_ranks(horovod_runner: Any) -> Callable[[int], Callable[..., list[Any]]]:
    """Return what runs ranks on this machine: ``run_ranks(2)(train, lr=0.1)`` is a list by rank."""
    from horovodrunner import validation as checked

    def ranks(number: int = 2) -> Callable[..., list[Any]]:
        number = checked.integer("number", abs(checked.integer("number", number)), at_least=1)

        def run(main: Callable[..., Any], /, **kwargs: Any) -> list[Any]:
            runner = horovod_runner(np=-number, results="all")
            runner.run(main, **kwargs)
            return list(runner.results)

        return run

    return ranks


@pytest.fixture
def training_data(tmp_path: Path) -> Callable[..., Any]:
    """Return what makes a data set of a table of pyarrow or pandas, or of a dict of columns."""
    from horovodrunner import data

    def make(table: Any, **options: Any) -> Any:
        import pyarrow as pa

        if isinstance(table, dict):
            table = pa.table(table)
        elif type(table).__module__.partition(".")[0] == "pandas":
            table = pa.Table.from_pandas(table, preserve_index=False)
        return data.from_arrow(table, **{"cache_dir": tmp_path / "training-data", **options})

    return make


@pytest.fixture
def checkpoint_dir(tmp_path: Path) -> Path:
    """Return a directory for ``HorovodRunner(checkpoint_dir=...)``."""
    return tmp_path / "checkpoints"


@pytest.fixture
def faults() -> Iterator[Faults]:
    """Let faults happen at chosen places in the runs of this test."""
    from horovodrunner.testing.faults import Faults

    with Faults() as made:
        yield made
