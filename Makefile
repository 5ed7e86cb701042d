# Two commands on a machine with Python >= 3.11 and make: `make demo` and `make test`.
# Each makes the virtual environment it needs and reuses it the next time.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
READY_DEV := $(VENV)/.ready-dev
# One process a core, each with one thread; many more would only import torch many more times.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4

.PHONY: demo test test-fast lint types check build clean help

help:
	@echo "make demo       set up, then train AEN beside L1 and TopK on synthetic data (minutes, no downloads of models or data)"
	@echo "make test       set up, then run every test"
	@echo "make test-fast  the tests without those that start processes or train for long"
	@echo "make check      lint, types and tests, as CI does"

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "aen-lightning needs Python 3.11 or newer, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)

$(READY): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	@touch $@

$(READY_DEV): $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

demo: $(READY)
	$(BIN)/aen demo

test: $(READY_DEV)
	$(PYTEST)

test-fast: $(READY_DEV)
	$(PYTEST) -m "not slow"

lint: $(READY_DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY_DEV)
	$(BIN)/mypy

check: lint types test

build: $(READY_DEV)
	$(BIN)/python -m build

clean:
	rm -rf $(VENV) build dist demo-output runs .pytest_cache .mypy_cache .ruff_cache
