# Two commands on a machine with Python >= 3.11 and make: `make demo` and `make test`.
# Each makes the virtual environment it needs and reuses it the next time.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
READY_DEV := $(VENV)/.ready-dev
READY_DOCS := $(VENV)/.ready-docs
# No constraint, which would be at odds with the one that a CUDA build of PyTorch asks for.
TRITON ?= triton==3.9.0
# An index to take PyTorch from, and nothing else, e.g. that of its CPU builds; empty: like all other packages.
TORCH_INDEX ?=
# One process a core, each with one thread; many more would only import torch many more times. Each takes a file at a
# time, whose tests share what it sets up.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-fast kernels lint types check docs docs-serve notebooks build clean help

help:
	@echo "make demo       set up, then train AEN beside L1 and TopK on synthetic data (minutes, no downloads of models or data)"
	@echo "make test       set up, then run every test"
	@echo "make test-fast  the tests without those that start processes or train for long"
	@echo "make kernels    the tests of the Triton kernels, under Triton's interpreter"
	@echo "make check      lint, types, tests, docs and notebooks, as CI does"
	@echo "make docs       build the documentation into build/site; any warning is an error"
	@echo "make docs-serve the same, shown while you write"
	@echo "make notebooks  run the notebooks"

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "aen-lightning needs Python 3.11 or newer, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)

$(READY): pyproject.toml constraints.txt | $(BIN)/python
	$(if $(TORCH_INDEX),$(BIN)/python -m pip install --quiet --no-deps --index-url $(TORCH_INDEX) --constraint constraints.txt torch)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	@touch $@

$(READY_DEV): $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

$(READY_DOCS): $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	@touch $@

demo: $(READY)
	$(BIN)/aen demo

test: $(READY_DEV)
	$(PYTEST)

test-fast: $(READY_DEV)
	$(PYTEST) -m "not slow"

# beside the environment, since other tests want to know what happens without Triton
build/triton: Makefile $(READY_DEV)
	rm -rf $@
	$(BIN)/python -m pip install --quiet --no-deps --target $@ $(TRITON)
	@touch $@

kernels: build/triton
	TRITON_INTERPRET=1 PYTHONPATH=build/triton $(PYTEST) tests/sparse/test_triton_kernels.py tests/training/test_kernel_step.py \
		tests/sparse/test_row_adam.py

lint: $(READY_DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY_DEV)
	$(BIN)/mypy

check: lint types test kernels docs notebooks

docs: $(READY_DOCS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

docs-serve: $(READY_DOCS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs serve

notebooks: $(READY_DOCS)
	OMP_NUM_THREADS=1 $(BIN)/python notebooks/run.py

build: $(READY_DEV)
	$(BIN)/python -m build

clean:
	rm -rf $(VENV) build dist demo-output runs .pytest_cache .mypy_cache .ruff_cache
