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

.PHONY: help demo test lint format bench lock venv clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' Makefile

demo: $(STAMP) ## a whole federation on this machine (ARGS="--nodes 5 --log kafka")
	@$(BIN)/atoll demo $(ARGS)

test: $(STAMP) ## all tests (ARGS="tests/test_layers.py -x")
	@$(BIN)/python -m pytest $(ARGS)

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

venv: $(STAMP) ## only set up .venv

clean: ## remove .venv, caches and builds
	@rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis build dist
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): requirements.lock pyproject.toml | $(BIN)/uv
	@echo "setting up .venv from requirements.lock"
	@$(UV) pip sync --compile-bytecode --python $(BIN)/python --require-hashes requirements.lock
	@$(UV) pip install --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $@

$(BIN)/uv:
	@command -v $(PYTHON) >/dev/null || { echo "error: '$(PYTHON)' not found; install Python 3.11 or newer, or name one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "error: Atoll needs Python 3.11 or newer, but $(PYTHON) is $$($(PYTHON) -V 2>&1); name a newer one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		"$$(sed -n 's/^\(uv==[^ ]*\).*/\1/p' requirements.lock 2>/dev/null || true)" 2>/dev/null \
		|| $(BIN)/python -m pip install --quiet --disable-pip-version-check uv
