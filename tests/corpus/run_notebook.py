"""Runs a notebook in Databricks' source format: cell after cell, in one namespace, with `spark`.

``python run_notebook.py NOTEBOOK``, in a process of its own. Shell cells and ``dbutils`` are not
known here.
"""

from __future__ import annotations

import linecache
import shutil
import sys
import types
from pathlib import Path

import pyspark
from pyspark.sql import SparkSession

HEAD = "# Databricks notebook source"
BETWEEN = "# COMMAND ----------"
MAGIC = "# MAGIC "


def code_cells(text: str) -> list[str]:
    """Return the Python cells; what is a comment in the file but code in the notebook, as code."""
    first, _, rest = text.partition("\n")
    if first != HEAD:
        raise ValueError(f"the first line is {first!r}, not {HEAD!r}")
    found = []
    for cell in rest.split(BETWEEN):
        lines = [line.removeprefix(MAGIC.rstrip()) for line in cell.strip().splitlines()]
        lines = [
            line.removeprefix(" ") if cell.strip().startswith(MAGIC) else line for line in lines
        ]
        if lines and lines[0].startswith("%"):
            magic, _, _ = lines[0].partition(" ")
            if magic == "%md":
                continue
            if magic != "%python":
                raise ValueError(f"the magic {magic} is not known here")
            lines = lines[1:]
        found.append("\n".join(lines) + "\n")
    return found


def run(path: Path, spark: SparkSession) -> None:
    """Execute the cells as the module ``__main__``."""
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    vars(module)["spark"] = spark
    for number, source in enumerate(code_cells(path.read_text()), start=1):
        name = f"<cell {number} of {path.name}>"
        linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
        exec(compile(source, name, "exec"), vars(module))


def main() -> None:
    """Make the session that Databricks would have made, and run the notebooks."""
    sys.ps1 = ">>> "  # as in a kernel, whose runs share a process that has torch
    spark = (
        SparkSession.builder.master("local-cluster[2,1,1024]")
        .config("spark.ui.enabled", "false")
        .config("spark.ui.showConsoleProgress", "false")
        .config("spark.log.level", "ERROR")
        .getOrCreate()
    )
    logs = Path(pyspark.__file__).parent / "work" / str(spark.sparkContext.applicationId)
    try:
        for path in sys.argv[1:]:
            print(f"NOTEBOOK {Path(path).name}", flush=True)
            run(Path(path), spark)
            print(flush=True)
    finally:
        spark.stop()
        shutil.rmtree(logs, ignore_errors=True)


if __name__ == "__main__":
    main()
