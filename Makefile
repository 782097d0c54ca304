# Everything a developer types. `make` alone lists it.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
STAMP_ALL := $(VENV)/.installed-all
# A file's tests stay together: they share servers.
PYTEST := $(BIN)/pytest --numprocesses logical --maxprocesses 4 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help setup check format test test-all test-rest test-gpu proto demo bench bench-triton clean

help: ## list these commands
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

# torch as constraints.txt pins it; on a machine that offers only its CUDA build, gigabytes.
$(STAMP_ALL): $(STAMP)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,torch,tensorrt,cuda]'
	@touch $@

setup: $(STAMP) ## install everything into .venv

check: $(STAMP) ## format, lint, types, stubs up to date
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(PYTHON) protos/generate.py --check

format: $(STAMP) ## rewrite the code in the project's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test: $(STAMP) ## the fast tests; skips what needs gcc, node or other packages
	$(PYTEST)

test-all: $(STAMP_ALL) ## every test; installs what they need, and a skip is a failure
	$(PYTEST) --all

test-rest: $(STAMP_ALL) ## of test-all, only what make test leaves out
	$(PYTEST) --rest

test-gpu: ## the tests that need a GPU, on a machine that has the packages; without one they say why
	$(BIN)/pytest -rs tests/gpu

proto: ## regenerate the stubs from protos/
	$(PYTHON) protos/generate.py

demo: $(STAMP) ## real models, real inputs, through a real server
	$(BIN)/thirdrail demo

bench: $(STAMP) ## measure; the results belong into bench/README.md
	$(BIN)/python -m bench

bench-triton: $(STAMP) ## the same for Triton's server beside ours; downloads 55 MB into .tools
	$(BIN)/python -m bench triton

clean: ## remove what the other commands made
	rm -rf $(VENV) .venv-proto .demo .tools dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
