"""What the rows of a DataFrame are computed from. Runs in: the driver.

A stored data set is used again only where Spark would compute the same rows now. So its key is what
Spark's optimizer makes of the plan at this moment, which has the current time and the like as
values, with the session's settings and the size, the time of the last change and the etag of every
file. All that is in a plan has to be known to depend on these alone. A plan with anything else (a
UDF, a random number, a cached DataFrame, JDBC, a format with a log of its own) has no key.
"""

from __future__ import annotations

import os
import pickletools
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

__all__ = ["Origin", "origin_of"]

_STATUS_THREADS = 16
_LEAVES = "CTERelationRef|LocalRelation|LogicalRDD|LogicalRelation|OneRowRelation|Range"
_KNOWN = re.compile(
    rf"""org\.apache\.spark\.sql\.(?:
        (?:catalyst\.plans\.logical|execution|execution\.datasources)\.(?:
            {_LEAVES}|Aggregate|Deduplicate|Distinct|EmptyRelation|Except|Expand|Filter|Generate
            |GlobalLimit|Intersect|Join|LocalLimit|Offset|Project|RebalancePartitions|Repartition
            |RepartitionByExpression|ResolvedHint|Sample|Sort|SubqueryAlias|Tail|Union|Window
            |WindowGroupLimit
        )
        |catalyst\.optimizer\.\w+
        # objects: methods of Java classes, some of which are functions of somebody's catalog
        |catalyst\.expressions\.(?!objects\.|Python|ScalaUDF|ApplyFunction|aggregate\.V2)[\w.]+\$?
    )""",
    re.VERBOSE,
)
_CLASS = re.compile(r'\{"class":"([^"]+)","num-children"')
_RDD = re.compile(r"(\w+)\[\d+\] at ")
_RDDS_OF_ROWS = {"MapPartitionsRDD", "ParallelCollectionRDD", "PythonRDD"}

_TEXT_OPERATORS = {"Filter", "LocalRelation", "Project", "Range"}
_TEXT_FUNCTIONS = {"abs", "array", "cast", "cos", "exp", "named_struct", "sin", "sqrt", "Some"}


class _UnknownError(Exception):
    """The rows may be others the next time."""


@dataclass(frozen=True)
class Origin:
    """What some rows were computed from."""

    df: DataFrame
    plan: Any
    """What the optimizer made of it; None over Spark Connect."""
    state: tuple[Any, ...]
    """Settings, and what tells one content of the files from another."""

    def is_same_as(self, other: Origin) -> bool:
        """Return whether it is certain that the same rows would be computed from both."""
        if self.df.sparkSession is not other.df.sparkSession or self.state != other.state:
            return False
        if self.plan is None or other.plan is None:
            return bool(self.df.sameSemantics(other.df))
        return bool(self.plan.sameResult(other.plan))


def origin_of(df: DataFrame) -> Origin | None:
    """Return what the rows of a DataFrame would be computed from now; None if that is unknown.

    Starts no job; asks for the status of every file.
    """
    try:
        if type(df).__module__.startswith("pyspark.sql.connect"):
            return Origin(df, None, _state_over_connect(df))
        return _origin(df)
    except (_UnknownError, OSError):
        return None


def _origin(df: DataFrame) -> Origin:
    from py4j.protocol import Py4JError
    from pyspark.errors import PySparkException

    try:
        for leaf in _each(df._jdf.queryExecution().analyzed().collectLeaves()):
            if not re.fullmatch(_LEAVES, _name(leaf)):  # optimizing some of these starts a process
                raise _UnknownError
        # a DataFrame of its own, because each is optimized once, and the time goes on
        plan = df.select("*")._jdf.queryExecution().optimizedPlan()
        sources = tuple(_sources(df.sparkSession, plan))
        settings = df.sparkSession._jsparkSession.conf().getAll().mkString("\n")
    except (Py4JError, PySparkException) as error:  # it cannot be computed either
        raise _UnknownError from error
    return Origin(df, plan, (settings, sources))


def _sources(spark: Any, plan: Any) -> Iterator[Any]:
    """Yield the state of all sources of a plan, and of the plans within its expressions."""
    # All classes in one string: asking for them one by one takes seconds for a wide table.
    classes = _CLASS.findall(plan.toJSON())
    if not plan.deterministic() or not all(map(_KNOWN.fullmatch, classes)):
        raise _UnknownError
    for leaf in _each(plan.collectLeaves()):
        if _name(leaf) == "LogicalRelation":
            yield _state_of_files(spark, leaf.relation())
        elif _name(leaf) == "LogicalRDD" and not _is_of_rows(spark, leaf.rdd()):
            raise _UnknownError
    for each in _each(plan.subqueriesAll()):
        yield from _sources(spark, each)


def _each(found: Any) -> Iterator[Any]:
    """Iterate over a sequence of Scala's."""
    return (found.apply(index) for index in range(found.size()))


def _name(thing: Any) -> str:
    return str(thing.getClass().getSimpleName())


def _state_of_files(spark: Any, relation: Any) -> tuple[Any, ...]:
    if _name(relation) != "HadoopFsRelation":
        raise _UnknownError
    index = relation.location()
    if _name(index) == "CatalogFileIndex":
        everything = spark._jvm.PythonUtils.toSeq(spark._jvm.java.util.ArrayList())
        index = index.filterPartitions(everything)
    if _name(index) not in (
        "InMemoryFileIndex",
        "PrunedInMemoryFileIndex",
    ):  # a log says which rows of its files are there
        raise _UnknownError
    files = [str(each) for each in index.inputFiles()]
    local = [each for each in files if urlsplit(each).scheme == "file"]
    remote = [each for each in files if urlsplit(each).scheme != "file"]
    statuses = [_local_status(unquote(urlsplit(each).path)) for each in local]
    if remote:
        with ThreadPoolExecutor(_STATUS_THREADS, "horovodrunner-files") as pool:
            found = list(pool.map(lambda each: _hadoop_status(spark, each), remote))
        # whoever counts seconds and has no etags cannot tell two writes within one of them
        if not any(etag or changed_ms % 1000 for _, changed_ms, etag in found):
            raise _UnknownError
        statuses += found
    return (local, remote, statuses, index.partitionSpec().toString())


def _local_status(path: str) -> tuple[Any, ...]:
    with open(path, "rb") as file:  # noqa: PTH123 - opening asks an NFS server what is there now
        status = os.fstat(file.fileno())
    # the time of the last change of the inode: whoever sets the other one back cannot set this
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def _hadoop_status(spark: Any, uri: str) -> tuple[int, int, str]:
    from py4j.protocol import Py4JError

    jvm = spark._jvm
    path = jvm.org.apache.hadoop.fs.Path(jvm.java.net.URI(uri))
    configuration = spark._jsparkSession.sessionState().newHadoopConf()
    status = path.getFileSystem(configuration).getFileStatus(path)
    etag = ""
    with suppress(Py4JError):  # not all have one
        etag = str(status.getEtag() or "")
    return status.getLen(), status.getModificationTime(), etag


def _is_of_rows(spark: Any, rdd: Any) -> bool:
    """Return whether an RDD has rows of createDataFrame, which no function made."""
    if set(_RDD.findall(rdd.toDebugString())) - _RDDS_OF_ROWS:
        return False
    commands = list(_commands(rdd))
    return not commands or commands == list(_commands(_example(spark)))


def _example(spark: Any) -> Any:
    rows = spark.createDataFrame([(0,)], "x long")
    return rows._jdf.queryExecution().analyzed().rdd()


def _commands(rdd: Any) -> Iterator[list[Any]]:
    """Yield what the functions of an RDD consist of, but for the size of batches."""
    if _name(rdd) == "PythonRDD":
        field = rdd.getClass().getDeclaredField("func")
        field.setAccessible(True)
        numbers = field.get(rdd).command().mkString(" ").split()
        command = bytes(int(number) % 256 for number in numbers)
        yield [
            (code.name, argument)
            for code, argument, _ in pickletools.genops(command)
            if not isinstance(argument, int)
        ]
    for each in _each(rdd.dependencies()):
        yield from _commands(each.rdd())


def _state_over_connect(df: DataFrame) -> tuple[Any, ...]:
    """Look at the one thing that shows what the server executes, the text of its plan.

    The state of files cannot be asked for there, and a text says little about functions: only what
    is made of the plan's own rows with a few well-known ones is known.
    """
    text = str(df._explain_string(mode="extended"))
    plan = re.search(r"== Optimized Logical Plan ==\n(.*?)\n\n?== Physical", text, re.DOTALL)
    lines = [line.lstrip(" :+-") for line in plan.group(1).splitlines()] if plan else [""]
    operators = {line.partition(" ")[0] for line in lines}
    functions = set(re.findall(r"(\w+)\(", "\n".join(lines)))
    is_cut = "more fields" in text
    if is_cut or operators - _TEXT_OPERATORS or functions - _TEXT_FUNCTIONS:
        raise _UnknownError
    return tuple(re.sub(r"#\d+", "#", line) for line in lines)
