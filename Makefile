# Two commands on a fresh machine with Python 3.11+: `make demo`, `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
CONSTRAINTS = cluster/constraints-cpu.txt
STAMP = $(VENV)/.installed

.PHONY: setup demo test lint

$(STAMP): pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	# torch by itself first: named later, a resolver may take the build with CUDA, which is gigabytes
	$(BIN)/pip install -q -c $(CONSTRAINTS) torch==2.13.0
	$(BIN)/pip install -q -c $(CONSTRAINTS) -e ".[dev]"
	touch $@

setup: $(STAMP)

demo: setup
	$(BIN)/tokenclean demo

test: setup
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
