# From a fresh clone: `make demo`, `make test`, `make lint`, `make bench`. Each sets up .venv from requirements.lock first.
# Needs git, make and Python 3.11 or newer. Choose one with PYTHON=python3.12; pass options on with ARGS="…".

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
STAMP := .venv/.from-lock
UV := $(BIN)/uv --quiet

# PyTorch's wheel for Linux on x86-64 brings 4 GB with CUDA's libraries, Debian's python3-torch takes 0.65 GB without them:
# where the system's own Python has PyTorch, that one is tested. TORCH_PYTHON= takes PyPI's.
TORCH_PYTHON ?= $(shell /usr/bin/python3 -c 'import sys, importlib.util as u; u.find_spec("torch") and print(sys.executable)' 2>/dev/null)
TORCH := torch==2.15.0
TORCH_BIN := .venv-torch/bin
TORCH_STAMP := .venv-torch/.from-lock

.PHONY: help demo test slow fuzz soak test-tensorflow test-torch lint format bench lock venv clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-15s %s\n", $$1, $$2}' Makefile

demo: $(STAMP) ## a whole federation on this machine (ARGS="--nodes 5 --log kafka")
	@$(BIN)/atoll demo $(ARGS)

test: $(STAMP) ## all tests (ARGS="tests/test_layers.py -x")
	@$(BIN)/python -m pytest $(ARGS)

soak: $(STAMP) ## 1,000 rounds with 20 nodes, and 200 rounds of chaos for each log (an hour)
	@$(BIN)/python -m pytest -s -m soak $(ARGS)

slow: $(STAMP) ## published results that take minutes each (an hour)
	@$(BIN)/python -m pytest -s -m slow $(ARGS)

fuzz: $(STAMP) ## a million spoilt inputs for every parser of what comes from outside (an hour and a half)
	@ATOLL_FUZZ=$(or $(FUZZ),95000) $(BIN)/python -m pytest tests/test_fuzz.py --timeout=3000 --durations=0 $(ARGS)

test-torch: $(TORCH_STAMP) ## the tests of the PyTorch learner, in an environment of their own
	@PYTHONPATH=src $(TORCH_BIN)/python -m pytest tests/learners/test_torch*.py $(ARGS)

test-tensorflow: .venv-tensorflow/.made ## Keras on TensorFlow, in an environment of its own (1.6 GB)
	@KERAS_BACKEND=tensorflow .venv-tensorflow/bin/python -m pytest tests/learners/test_keras_backends.py $(ARGS)

lint: $(STAMP) ## style, types and ranks
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy --strict src
	@$(BIN)/lint-imports --no-cache --no-logo

format: $(STAMP) ## mend what can be mended by itself
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

bench: $(STAMP) ## every benchmark (ARGS="--json")
	@$(BIN)/atoll bench all $(ARGS)

lock: $(BIN)/uv ## make requirements.lock anew from pyproject.toml (ARGS=--upgrade for newer versions)
	@$(UV) pip compile pyproject.toml --extra dev --universal --python-version 3.11 --generate-hashes \
		--no-emit-index-url --no-emit-find-links --custom-compile-command "make lock" --output-file requirements.lock $(ARGS)
	@$(UV) pip compile pyproject.toml --group torch-tests --universal --python-version 3.11 --generate-hashes \
		--no-emit-index-url --no-emit-find-links --custom-compile-command "make lock" --output-file requirements-torch.lock $(ARGS)

venv: $(STAMP) ## only set up .venv

clean: ## remove .venv, caches and builds
	@rm -rf .venv .venv-torch .venv-tensorflow .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis build dist
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): requirements.lock pyproject.toml | $(BIN)/uv
	@echo "setting up .venv from requirements.lock"
	@$(UV) pip sync --compile-bytecode --python $(BIN)/python --require-hashes requirements.lock
	@$(UV) pip install --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $@

$(TORCH_STAMP): requirements-torch.lock | $(BIN)/uv
	@echo "setting up .venv-torch: PyTorch $(if $(TORCH_PYTHON),of $(TORCH_PYTHON),from PyPI)"
	@$(UV) venv --clear --python $(or $(TORCH_PYTHON),$(BIN)/python) $(if $(TORCH_PYTHON),--system-site-packages) .venv-torch
	@$(UV) pip sync --python $(TORCH_BIN)/python --require-hashes requirements-torch.lock
	@$(if $(TORCH_PYTHON),,$(UV) pip install --python $(TORCH_BIN)/python $(TORCH))
	@touch $@

.venv-tensorflow/.made: requirements.lock pyproject.toml | $(BIN)/uv
	@echo "setting up .venv-tensorflow"
	@$(UV) venv --clear --python $(BIN)/python .venv-tensorflow
	@$(UV) pip install --python .venv-tensorflow/bin/python --constraint requirements.lock --editable ".[tensorflow]" \
		hypothesis pytest pytest-timeout safetensors
	@touch $@

$(BIN)/uv:
	@command -v $(PYTHON) >/dev/null || { echo "error: '$(PYTHON)' not found; install Python 3.11 or newer, or name one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "error: Atoll needs Python 3.11 or newer, but $(PYTHON) is $$($(PYTHON) -V 2>&1); name a newer one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		"$$(sed -n 's/^\(uv==[^ ]*\).*/\1/p' requirements.lock 2>/dev/null || true)" 2>/dev/null \
		|| $(BIN)/python -m pip install --quiet --disable-pip-version-check uv
