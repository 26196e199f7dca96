# make demo      set up, generate data, train with two processes, evaluate, show
# make test      lint, types, unit and two-process tests
# make test-all  the above and what takes longer or needs root
#
# TORCH="torch==2.13.0"   the torch to install; on a GPU machine name the build that fits its driver, with pip's options
#                         if it needs any: make demo TORCH="torch==2.13.0 --index-url URL"
# EXTRAS=dev,clips,serve,gguf   extras of the package; opensmile, for research only by its licence, is tested where it is among them
# JOBS=3                  processes that run tests side by side
# PYTHON=python3          the interpreter the environment is made from (3.10 or later)

SHELL := /bin/bash
PYTHON ?= python3
TORCH ?= torch==2.13.0
EXTRAS ?= dev,clips,serve,gguf
VENV ?= .venv
BIN := $(VENV)/bin
RUN ?= runs
JOBS ?= 3

export TORCH_EXTENSIONS_DIR ?= $(CURDIR)/.cache/torch_extensions
export MLFLOW_DISABLE_TELEMETRY ?= true
export HF_HUB_DISABLE_TELEMETRY ?= 1
export TOKENIZERS_PARALLELISM ?= false
export PYTHONUNBUFFERED ?= 1
# Hundreds of processes import the same modules: their bytecode is kept, whatever the surroundings say.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test test-all pytest lint types install clean

install:
	@PYTHON="$(PYTHON)" VENV="$(VENV)" TORCH="$(TORCH)" EXTRAS="$(EXTRAS)" bash launch/setup_env.sh

demo: install
	$(BIN)/egmf demo --runs $(RUN)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

# lint and types run beside the tests: see tests/conftest.py for the order of these.
BESIDE = $(MAKE) --no-print-directory -j3 lint types pytest

test: install
	@$(BESIDE) MARKS="not slow and not browser and not slurm and not multinode" DURATIONS=15

test-all: install
	@$(BESIDE) MARKS="" DURATIONS=25

pytest: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "$(MARKS)" -n $(JOBS) --dist loadgroup --durations=$(DURATIONS)

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
