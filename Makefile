# Every target sets up .venv first where it is missing or older than what it was made from.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
# Without byte code, Ray's many processes take twice as long to start.
unexport PYTHONDONTWRITEBYTECODE

BIN := .venv/bin
READY := .venv/.ready
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --progress-bar off --constraint constraints.txt

# Two processes of tests: one begins with `on_ray`, the other with `e2e` (tests/conftest.py).
PYTEST := $(BIN)/python -m pytest --numprocesses 2 --dist loadscope --no-loadscope-reorder

.PHONY: help venv demo test test-full lint

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' Makefile

venv: $(READY)  ## sets up .venv with lmray and everything it needs

demo: $(READY)  ## fine-tunes, keeps, serves and asks a small model, on this machine
	@$(BIN)/lmray demo

test: lint  ## lint and every test but the slow ones and those that need a GPU
	@$(PYTEST) -m "not slow and not gpu"
	@echo "make test: the deselected tests above are marked slow (make test-full runs them) or gpu (they need a GPU)"

test-full: lint  ## lint and every test but those that need a GPU, with the packages only some of them need
	@$(PIP) --editable ".[dev,quant,optimizers]"
	@$(PYTEST) -m "not gpu"
	@echo "make test-full: the deselected tests above are marked gpu (they need a GPU)"

lint: $(READY)  ## style, floors and types, without running anything
	@echo "lint: ruff"
	@$(BIN)/ruff check --quiet --output-format concise .
	@$(BIN)/ruff format --check --quiet . || { echo "lint: not formatted as \`$(BIN)/ruff format .\` would"; exit 1; }
	@echo "lint: import-linter"
	@$(BIN)/lint-imports --no-logo --no-cache
	@echo "lint: pyright"
	@$(BIN)/pyright

$(READY): pyproject.toml constraints.txt
	@python=$$(for name in python3.11 python3.12 python3.13 python3; do \
	  if $$name -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2> /dev/null; then \
	    echo $$name; break; fi; done); \
	if [ -z "$$python" ]; then \
	  echo "venv: no Python 3.11 to 3.13 with the module venv on the PATH; hint: install python3.11 and python3.11-venv" >&2; \
	  exit 1; fi; \
	echo "venv: $$($$python --version) in .venv"; \
	[ -x $(BIN)/python ] || $$python -m venv .venv
	@echo "venv: torch (the largest download)"
	@$(PIP) torch
	@echo "venv: the other packages"
	@$(PIP) --editable ".[dev]"
	@touch $(READY)
	@echo "venv: ready"
