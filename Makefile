# Two commands on a fresh machine: `make demo` and `make test`. Everything lives in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DIR ?= .fi
export TESTCONTAINERS_RYUK_DISABLED := true

.PHONY: help setup demo up down check test test-slow crash bench bench-storage clean
.DEFAULT_GOAL := help

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-13s %s\n", $$1, $$2}'

setup: $(STAMP) ## install into .venv

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,bench]'
	@touch $@

demo: setup ## events through four processes and a 3-node cluster into HDF5 (INPUT=file.ndjson, EVENTS=n, RATE=per_s)
	$(BIN)/fictl demo $(if $(INPUT),--input $(INPUT)) $(if $(EVENTS),--events $(EVENTS)) $(if $(RATE),--rate $(RATE))

up: setup ## start cluster and stages in the background (DIR=.fi)
	$(BIN)/fictl up --dir $(DIR) --detach

down: setup ## stop what `make up` started
	$(BIN)/fictl down --dir $(DIR)

check: setup ## style, types, layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: check ## everything that must hold, about ten minutes
	$(BIN)/pytest

test-slow: setup ## what `make test` leaves out, about three minutes
	$(BIN)/pytest -m slow

crash: setup ## kill -9 and power cuts against persist's files (N=1000 SEED=1), about ten minutes
	$(BIN)/python -m tests.chaos.crash --runs $(or $(N),1000) --seed $(or $(SEED),1)

bench: setup ## latency and throughput, about five minutes
	$(BIN)/python -m benchmarks

bench-storage: setup ## the store's files beside classic HDF5 designs (EVENTS=1000000), about ten minutes
	$(BIN)/python -m benchmarks.storage $(if $(EVENTS),--events $(EVENTS))

clean: ## remove .venv, caches and the default data directory
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache build *.egg-info $(DIR)
