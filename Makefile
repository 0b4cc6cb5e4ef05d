# Every target makes its own .venv and installs what it needs; the second run starts at once.
PYTHON ?= python3
VENV ?= .venv
OUT ?= demo_out
PYTEST_ARGS ?=
# each takes a core and up to 2 GB
PYTEST_WORKERS ?= 2
BENCH_ARGS ?=

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

# Changes with the declared dependencies, so a changed pyproject.toml installs again.
KEY := $(shell cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)
BIN := $(VENV)/bin
READY := $(VENV)/ready-$(KEY)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.NOTPARALLEL:
.PHONY: help demo test bench lint clean

help:
	@echo "make demo   train and sample on real data, write the pictures to $(OUT)/"
	@echo "make test   the test suite"
	@echo "make bench  the benchmarks"
	@echo "make lint   ruff, ruff format, mypy"
	@echo "make clean  remove $(VENV) and the caches"

$(READY)-torch:
	@$(PYTHON) -c 'import sys; sys.exit("fastdiff needs Python 3.11 or newer; this is %d.%d; name another one by: make PYTHON=python3.12" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	@echo "==> making the virtual environment $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@echo "==> installing torch (the big download; once)"
	@$(BIN)/python -m pip install -c constraints.txt torch==2.13.0
	@touch $@

$(READY)-%: | $(READY)-torch
	@echo "==> installing fastdiff[$*] into $(VENV)"
	@$(BIN)/python -m pip install -c constraints.txt -e '.[$*]'
	@# a sampler library to compare with; what its training scripts require is left out
	@case '$*' in *test*|*bench*) $(BIN)/python -m pip install --no-deps -c constraints.txt k-diffusion;; esac
	@touch $@

demo: $(READY)-demo
	@echo "==> running the demo"
	@$(BIN)/python -u -m fastdiff demo --out '$(OUT)'

test: $(READY)-test
	@echo "==> running the tests"
	@$(BIN)/python -m pytest -n $(PYTEST_WORKERS) --dist worksteal $(PYTEST_ARGS)

bench: $(READY)-bench,diffusers
	@echo "==> what the kernels compile to"
	@$(BIN)/python -m fastdiff bench --codegen
	@echo "==> what a step costs, beside what others cost"
	@$(BIN)/python -m fastdiff bench $(BENCH_ARGS)
	@echo "==> every kernel and whole loops on pytest-benchmark"
	@MALLOC_MMAP_THRESHOLD_=1099511627776 MALLOC_TRIM_THRESHOLD_=1099511627776 \
	  $(BIN)/python -m pytest bench/bench_*.py -q -p no:cacheprovider --benchmark-columns=median,iqr,rounds \
	  --benchmark-group-by=group --benchmark-sort=name --benchmark-warmup=off

lint: $(READY)-dev,test
	@echo "==> ruff, ruff format, mypy"
	@$(BIN)/python -m ruff check .
	@$(BIN)/python -m ruff format --check .
	@$(BIN)/python -m mypy

clean:
	rm -rf '$(VENV)' build dist .pytest_cache .mypy_cache .ruff_cache
