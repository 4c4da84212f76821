# Every target works on a fresh machine: what it needs is installed first. `make help` lists them.
.DEFAULT_GOAL := help
SHELL := bash
PYTHON ?= python3.11
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PROTOS := $(wildcard protos/detflow/v1/*.proto)

.PHONY: help setup demo up test cluster models fuzz chaos audit check protos lock bench scale clean

help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 12

setup: $(READY)  ## create .venv and install everything from the lock file

$(READY): requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	@echo 'installing into $(VENV): about 6 GB with PyTorch, some minutes the first time'
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

demo: $(READY)  ## train a small model on generated data, from nothing to its metrics
	$(BIN)/detflow demo $(ARGS)

up: $(READY)  ## run the whole stack on this machine until Ctrl-C
	$(BIN)/detflow up $(ARGS)

test: $(READY)  ## run the tests, two files at a time (JOBS=0: one, in this process)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

cluster: $(READY)  ## run the tests on a Ray cluster of two nodes: some minutes, some gigabytes
	DETFLOW_TEST_CLUSTER=1 $(BIN)/python -m pytest tests/cluster $(ARGS)

models: $(READY)  ## export all 18 models untrained, and print how far ONNX and OpenVINO are from PyTorch: some minutes
	DETFLOW_TEST_MODELS=1 $(BIN)/python -m pytest -s tests/models $(ARGS)

fuzz: $(READY)  ## send 50,000 random calls to a stack of its own, import 10,000 damaged data sets: some minutes
	$(BIN)/python -m tests.fuzz $(ARGS)
	DETFLOW_FUZZ_CASES=10000 $(BIN)/python -m pytest tests/unit/test_preprocess_fuzz.py

chaos: $(READY)  ## kill everything 2,000 times while users work, and check all invariants: half an hour to an hour
	DETFLOW_CHAOS_KILLS=2000 DETFLOW_CHAOS_RACES=1000 DETFLOW_CHAOS_HISTORIES=1000 \
	  DETFLOW_CHAOS_REPORT=chaos-report.md $(BIN)/python -m pytest --timeout 0 tests/chaos/test_campaign.py \
	  tests/chaos/test_races.py tests/chaos/test_histories.py $(ARGS)
	@cat chaos-report.md

audit: $(READY)  ## look for known weaknesses in the code and in what is installed; write var/sbom.json
	$(BIN)/bandit --quiet --configfile pyproject.toml --recursive detflow services gateway
	@mkdir -p var
	$(BIN)/cyclonedx-py requirements requirements.lock --output-format JSON --output-file var/sbom.json
	$(BIN)/pip-audit --strict --no-deps --disable-pip --progress-spinner off --requirement requirements.lock

check: $(READY)  ## formatting, lint, types, import rules, proto rules, generated code
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/buf lint protos
	bash tools/breaking.sh
	bash tools/protos.sh --check
	$(BIN)/python tools/descriptions.py --check

protos: $(READY)  ## generate the stubs in detflow/v1 from protos/
	bash tools/protos.sh
	$(BIN)/python tools/descriptions.py

lock: $(READY)  ## resolve pyproject.toml into requirements.lock again
	$(BIN)/pip-compile --quiet --strip-extras --all-extras --no-header --no-emit-index-url \
	  --no-emit-find-links --no-emit-options --allow-unsafe --output-file requirements.lock pyproject.toml
	@# The extras name detflow itself; the lock is about everything else.
	sed -i '/^detflow @/,+1d' requirements.lock

bench: $(READY)  ## measure what docs/performance.md reports
	$(BIN)/python -m tests.benchmarks $(ARGS)

scale: $(READY)  ## fill a system with a million versions and measure it: ten minutes, 10 GB
	$(BIN)/python -m tests.scale $(ARGS)

clean:  ## remove the environment
	rm -rf $(VENV)
