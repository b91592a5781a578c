"""How fast it is, measured beside the peers: ``python -m benchmarks [case ...]``.

Every case measures its ways in turn in one run and gives one table. Without names all cases run;
``--rounds`` and ``--json`` are the same for all of them.
"""

from __future__ import annotations

import argparse
import compileall
import importlib
import json
import os
import sys
from pathlib import Path

import horovodrunner
from benchmarks.report import machine

CASES = (
    "launch",
    "first",
    "phases",
    "training",
    "result",
    "logs",
    "scale",
    "coordinator",
    "checkpoint",
    "sharded",
    "parts",
    "metrics",
)
"""Modules of this package with a function ``measure(rounds) -> Case``."""


def main() -> None:
    """Run the cases that were asked for."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("cases", nargs="*", metavar="case", help=f"{', '.join(CASES)}; all if none")
    parser.add_argument("--rounds", type=int, default=5, help="how often each way is measured")
    parser.add_argument("--json", type=Path, help="file to write all figures to")
    options = parser.parse_args()
    if unknown := set(options.cases) - set(CASES):
        parser.error(f"no such case: {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    # As pip does: where Python may not write what it has compiled, every start would compile anew.
    compileall.compile_dir(Path(horovodrunner.__file__).parent, quiet=1)
    where = machine()
    print(f"{where['processor']}, {where['cores']} cores, {where['memory_gib']} GiB")
    print(", ".join(f"{name} {version}" for name, version in where["versions"].items()))
    results = []
    for name in options.cases or CASES:
        case = importlib.import_module(f"benchmarks.{name}").measure(options.rounds)
        print(f"\n{case.table()}", flush=True)
        results.append(case.to_json())
        if options.json:
            options.json.write_text(json.dumps({"machine": where, "cases": results}, indent=1))


if __name__ == "__main__":
    main()
