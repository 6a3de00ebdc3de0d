# Every target prepares what it needs: `make demo` and `make test` work on a fresh clone.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
RUNTIME := $(VENV)/.runtime-installed
DEV := $(VENV)/.dev-installed
PIP_INSTALL := $(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check -c constraints.txt
CHECKED := src tests $(wildcard benchmarks scripts)

# Two threads suit small machines and keep runs comparable; nothing here may reach a model hub.
THREADS ?= 2
LOCAL := OMP_NUM_THREADS=$(THREADS) HF_HUB_OFFLINE=1

.DEFAULT_GOAL := help
.PHONY: help demo test check format bench bench-quick redteam docs proto clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: $(RUNTIME)  ## split the packaged model over two processes and generate through it
	$(BIN)/fedsea demo $(ARGS)

# Two files at a time, the short ones first; tests start servers of their own, on ports of their own.
test: $(DEV)  ## run every test (ARGS="-k name" for some)
ifdef ARGS
	$(LOCAL) $(BIN)/python -m pytest $(ARGS)
else
	$(LOCAL) OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(THREADS) --dist loadfile \
	  --no-loadscope-reorder tests/unit tests/fuzz tests/integration
endif

check: $(DEV)  ## format, lint, types, architecture, docs: what must pass before a commit
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy $(CHECKED)
	$(BIN)/lint-imports --no-logo
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

format: $(DEV)  ## format the code and fix what the linter can fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(DEV)  ## measure everything and write benchmarks/results/
	$(BIN)/python -m benchmarks.run $(ARGS)

bench-quick: $(DEV)  ## the ratios that matter, in under six minutes on two cores
	$(BIN)/python -m benchmarks.run --quick $(ARGS)

# Texts and pretrained models are not in the repository; ASSETS says where they are.
ASSETS ?= ../shared/assets
REDTEAM := $(BIN)/fedsea redteam --text $(ASSETS)/data/tinystories/valid_cased.txt --threads $(THREADS)
REPORT := benchmarks/results/$(shell date -u +%F)-redteam

redteam: $(DEV)  ## attack two pretrained models under every mechanism, write benchmarks/results/
	$(REDTEAM) --model $(ASSETS)/models/stories260K --bottom 0 --bottom 1 --sweep --json .redteam-1.json $(ARGS)
	$(REDTEAM) --model $(ASSETS)/models/tinystories656K --bottom 0 --bottom 1 --sweep --json .redteam-2.json $(ARGS)
	$(REDTEAM) --model $(ASSETS)/models/stories260K --bottom 2 --bottom 3 $(ARGS) \
	  --add .redteam-1.json --add .redteam-2.json \
	  --json $(REPORT).json --markdown $(REPORT).md --html $(REPORT).html
	rm -f .redteam-1.json .redteam-2.json

docs: $(DEV)  ## build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

proto: $(DEV)  ## regenerate the protobuf module from src/fedsea/wire/trunk.proto
	$(BIN)/python -m grpc_tools.protoc -I src --python_out=src --pyi_out=src src/fedsea/wire/trunk.proto

clean:  ## remove .venv, caches and everything built
	rm -rf $(VENV) site build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -rf src/fedsea.egg-info

# The virtual environment. `setuptools` comes first, at its pinned version, so that building the
# editable install downloads nothing unpinned.

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "fedsea needs Python 3.11 or newer: make PYTHON=/path/to/python3.11"; exit 1; }
	@echo "making $(VENV) with $(PYTHON)"
	@$(PYTHON) -m venv $(VENV) \
	  || { rm -rf $(VENV); echo "cannot make $(VENV): is the venv module of Python installed?"; exit 1; }

$(RUNTIME): pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing fedsea from pinned versions into $(VENV)"
	@$(PIP_INSTALL) setuptools
	@$(PIP_INSTALL) --no-build-isolation -e '.$(if $(wildcard $(DEV)),[dev])'
	@touch $@ $(wildcard $(DEV))

$(DEV): pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing fedsea and its tools from pinned versions into $(VENV)"
	@$(PIP_INSTALL) setuptools
	@$(PIP_INSTALL) --no-build-isolation -e '.[dev]'
	@touch $@ $(RUNTIME)
