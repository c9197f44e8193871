# Two commands on a fresh machine: `make demo` and `make test`. Everything lives in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DIR ?= .fi
export TESTCONTAINERS_RYUK_DISABLED := true
# Tests and benchmarks start hundreds of processes, each of which would compile every module anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup demo up down check test test-slow simulate fuzz image crash chaos bench bench-check bench-full bench-soak bench-storage bench-restart bench-backlog clean
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
	$(BIN)/mypy --num-workers auto

test: check ## everything that must hold, six to fifteen minutes (JOBS=5 test processes)
	$(BIN)/pytest --numprocesses $(or $(JOBS),5) --dist loadfile --no-loadscope-reorder

test-slow: setup ## what `make test` leaves out, ten minutes and more (JOBS=2 test processes)
	$(BIN)/pytest -m slow --numprocesses $(or $(JOBS),2) --dist loadfile --no-loadscope-reorder

image: setup ## the container image fi-pipeline:latest, from the wheel and nats-server; needs a Docker engine, no registry
	rm -rf build/wheel
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir build/wheel .
	$(BIN)/python -m cluster.deploy.image --wheel build/wheel/*.whl

simulate: setup ## clusters in virtual time, killed, frozen and lied to (SEEDS=1000 START=1 JOBS=1), about a minute
	$(BIN)/python -m cluster.testing.sim --seeds $(or $(SEEDS),1000) --start $(or $(START),1) --jobs $(or $(JOBS),1)

fuzz: setup ## hostile bytes, guided by coverage (MINUTES=5 TARGET=ingest SEED=1; KEEP=1 adds what shows something new)
	$(BIN)/python -m tests.hostile.fuzz search --minutes $(or $(MINUTES),5) --target $(or $(TARGET),all) --seed $(or $(SEED),1) $(if $(KEEP),--keep)

crash: setup ## kill -9 and power cuts against persist's files (N=1000 SEED=1), about ten minutes
	$(BIN)/python -m tests.chaos.crash --runs $(or $(N),1000) --seed $(or $(SEED),1)

chaos: setup ## faults on a running pipeline, by a schedule that SEED decides (MINUTES=10 SEED=1)
	$(BIN)/python -m cluster.testing.chaos --minutes $(or $(MINUTES),10) --seed $(or $(SEED),1)

bench: setup ## every headline figure, beside the ceiling and the alternatives, under five minutes
	$(BIN)/python -m benchmarks

bench-check: setup ## are the headline's ratios clearly worse than the kept ones? about two minutes (JSON=1)
	$(BIN)/python -m benchmarks.check $(if $(JSON),--json)

bench-full: setup ## `make bench`, then every experiment: curves, ablation, model (ONLY="hashes sizes"), about an hour
	$(if $(ONLY),,$(BIN)/python -m benchmarks)
	$(BIN)/python -m benchmarks.experiments $(ONLY)

bench-soak: setup ## full speed for long, and whether memory stays flat (MINUTES=80)
	$(BIN)/python -m benchmarks.experiments.soak --minutes $(or $(MINUTES),80)

bench-storage: setup ## the store's files beside classic HDF5 designs (EVENTS=1000000), about ten minutes
	$(BIN)/python -m benchmarks.storage $(if $(EVENTS),--events $(EVENTS))

bench-restart: setup ## a rolling restart of all stages under load, about six minutes
	$(BIN)/python -m benchmarks.restart

bench-backlog: setup ## events that waited for stopped stages, and how fast they drain, about five minutes
	$(BIN)/python -m benchmarks.backlog

clean: ## remove .venv, caches and the default data directory
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build *.egg-info $(DIR)
