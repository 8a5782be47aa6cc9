# Every target but help and clean makes .venv first, if it is missing or its requirements changed.
#
# Variables (make NAME=value target):
#   PYTHON       interpreter that makes the environment, 3.11 or newer    (python3)
#   VENV         the environment's folder                                 (.venv)
#   PIP_ARGS     more arguments for pip install, such as another index
#   ARGS         arguments of the demo, such as ARGS="--model NAME_OR_PATH"
#   PYTEST_ARGS  arguments of the tests           (-q -n auto --maxprocesses 8 -m "not slow")

PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
ARGS ?=
PYTEST_ARGS ?= -q -n auto --maxprocesses 8 -m "not slow"
SLOW_ARGS ?= -q -m "slow and not kernels"
KERNEL_ARGS ?= -q -n auto --maxprocesses 8 -m kernels

# Without it, loading a model waits for a hub that may not be reachable. HF_HUB_OFFLINE=0 in the
# environment lets the demo fetch the model of --model.
export HF_HUB_OFFLINE ?= 1

bin := $(VENV)/bin
stamp := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-kernels lint types format clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile
	@echo "  variables: PYTHON VENV PIP_ARGS ARGS PYTEST_ARGS SLOW_ARGS KERNEL_ARGS (see the head of the Makefile)"

demo: $(stamp) ## write three texts with a real model, next to plain decoding
	$(bin)/python -m specdec demo $(ARGS)

test: lint types ## lint, type check and all tests but the slow ones
	$(bin)/python -m pytest $(PYTEST_ARGS)

test-slow: $(stamp) ## the slow tests
	$(bin)/python -m pytest $(SLOW_ARGS)

# A CUDA build of torch brings its own Triton, which stays.
test-kernels: $(stamp) ## all tests of kernels: in Triton's interpreter, or on a GPU; compiled for sm_90
	$(bin)/python -c 'import triton' 2>/dev/null \
		|| $(bin)/python -m pip install --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[triton]'
	$(bin)/python -m pytest $(KERNEL_ARGS)

lint: $(stamp) ## ruff: rules and format
	$(bin)/ruff check .
	$(bin)/ruff format --check .

types: $(stamp) ## mypy --strict
	PYTHON=$(bin)/python ./scripts/typecheck.sh

format: $(stamp) ## repair what ruff can repair
	$(bin)/ruff check --fix-only .
	$(bin)/ruff format .

clean: ## remove build outputs and caches; the environment stays
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .coverage htmlcov
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# build/ goes first: setuptools would ship modules from it that have been deleted since.
# torch goes before the rest: it is by far the largest, and the rest then finds it in place.
$(stamp): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "$(PYTHON) must be Python 3.11 or newer; choose another: make PYTHON=python3.12 ..." >&2; exit 1; }
	test -x $(bin)/pip || $(PYTHON) -m venv $(VENV)
	rm -rf build
	$(bin)/python -m pip install --disable-pip-version-check $(PIP_ARGS) -c constraints.txt torch
	$(bin)/python -m pip install --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[dev,demo]'
	@touch $@
