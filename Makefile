# Everything runs in .venv, which every target sets up first if it has to.
# Another interpreter: make clean, then make demo PYTHON=python3.12

PYTHON ?= python3
BIN := .venv/bin

# What "make test-spark" runs, and with which releases of PySpark beside that of constraints.txt: the newest
# that begin so.
SPARK ?= 3.5 4.1
TESTS ?= tests/spark
# What "make test-newest" and "make test-python" run, the latter with which Pythons.
NEWEST ?= tests/docs/test_readme.py tests/horovod tests/spark/test_pyspark_version.py \
  tests/spark/test_cluster_runs.py tests/spark/test_data.py tests/spark/test_connect.py
PYTHONS ?= 3.10 3.12 3.13
PYTHON_TESTS ?= tests/unit tests/process tests/spark
# Two files at a time on two cores: with three, each test takes twice as long.
# A file's tests stay together, and so do the files that share a session (tests/conftest.py).
PARALLEL := -n auto --maxprocesses 4 --dist loadfile

# What one process has compiled, the others find.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help python setup setup-demo demo check test test-all test-spark test-without-horovod test-newest
.PHONY: test-python bench lint docs clean

help:
	@echo "make demo        set everything up and train a small network on a two-executor Spark cluster"
	@echo "make check       linters and the unit tests, but for what takes long: before each commit"
	@echo "make test        set everything up and run the linters, the documentation build and the tests"
	@echo "make test-all    the same, and the tests that are marked slow, too"
	@echo "make test-spark  run the Spark tests with the oldest PySpark and with 4.1; SPARK=4.0 names"
	@echo "                 another one. Each has an environment of its own in build/"
	@echo "make test-without-horovod  run what needs no Horovod where there is none; part of make test"
	@echo "make test-newest run some of the tests with the newest packages that the registry has, in"
	@echo "                 build/newest, with Horovod built for them: 5 GB, 10 minutes the first time"
	@echo "make test-python run the tests that need no torch with other Pythons: PYTHONS='3.12 3.13'"
	@echo "make bench       measure beside the peers (some cases: make bench CASES='launch result')"
	@echo "make setup       only set everything up: .venv, all dependencies, Horovod built for them"
	@echo "make lint        ruff, mypy and the import contracts"
	@echo "make docs        build the documentation, warnings are errors: docs/_build/html/index.html"
	@echo "make clean       remove .venv and everything that is generated"
	@echo
	@echo "Needs Python 3.10 or newer, Java 17 or newer, a C++20 compiler, cmake, make and git."
	@echo "Another interpreter: make clean, then make demo PYTHON=python3.12"

setup: python
	@$(PYTHON) scripts/setup.py

setup-demo: python
	@$(PYTHON) scripts/setup.py demo

python:
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) was not found: install Python 3.10" \
	  "or newer (Debian/Ubuntu: apt install python3-dev python3-venv) or name one:" \
	  "make PYTHON=/path/to/python3" >&2; exit 1; }

demo: setup-demo
	@$(BIN)/python examples/digits.py

check: setup
	$(BIN)/python -m pytest -q -m "not slow and not heavy" $(PARALLEL) tests/test_lint.py tests/unit

# The linters, the documentation build and the environment without Horovod are among the tests, and
# run beside the others.
test: setup
	$(BIN)/python scripts/archive_classes.py
	$(BIN)/python -m pytest -m "not slow" $(PARALLEL)

test-all: setup
	$(BIN)/python scripts/archive_classes.py
	$(BIN)/python -m pytest $(PARALLEL)

test-spark: setup
	@set -e; for release in $(SPARK); do \
	  $(BIN)/python scripts/other_spark.py $$release $(PARALLEL) $(TESTS); done

test-without-horovod: setup
	@$(BIN)/python scripts/without_horovod.py tests/without_horovod

test-newest:
	@$(PYTHON) scripts/newest.py $(PARALLEL) $(NEWEST)

test-python:
	@set -e; for version in $(PYTHONS); do \
	  $(PYTHON) scripts/newest.py --python $$version $(PARALLEL) $(PYTHON_TESTS); done

bench: setup
	$(BIN)/python -m benchmarks $(CASES)

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: setup
	$(BIN)/sphinx-build -q -W -b html docs docs/_build/html

clean:
	rm -rf .venv build dist docs/_build work spark-warehouse *.egg-info
	rm -rf .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
