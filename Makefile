# Two commands matter: `make demo` and `make test`. Both set everything up first, without root,
# Docker, a model hub or any server that happens to run here. Everything stays inside this folder.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.lorainit-ready
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
# Every package in the version and with the hash that requirements/ has: docs/decisions/0037
LOCKED := $(PIP) install --require-hashes --no-deps
# Processes of `make test`; each runs whole files: docs/decisions/0063
N ?= auto

.PHONY: help setup demo serve test test-times test-quick test-slow zoo chaos check lint audit lock licences bench-api bench-init bench-train bench-rates evidence bench-load bench-start gpu-day docs clean

help:
	@echo "make demo       train, download and check a LoRA adapter through the whole service"
	@echo "make test       the whole test suite, in one process more than there are cores; N=0: in one process"
	@echo "make test-times what the last make test took: docs/tests.md (the slowest tests) and the order of files"
	@echo "make test-quick the tests of what differs from main (BASE=), then a few of everything, in about a minute"
	@echo "make serve      keep the service running; prints its URL and a first API key"
	@echo "make check      format, lint, types, import contracts, migration drift, tests, audit"
	@echo "make lint       all of make check but the tests and the audit (minutes)"
	@echo "make audit      known holes in the installed packages (needs the network)"
	@echo "make licences   the licence of every installed package; fails on one that is unknown or forbidden"
	@echo "make lock       what is installed, with hashes, from pyproject.toml and constraints.txt (needs the network); UPGRADE=1"
	@echo "make test-slow  the tests that need minutes"
	@echo "make zoo        try every architecture of tests/zoo beside stock transformers and PEFT; writes docs/models.md (half an hour); ONLY="
	@echo "make chaos      kill, freeze, cut off and fill up everything while jobs run (10 minutes); SEED= SECONDS= KILLS= MUTANT= STORAGE=bucket DATABASE=sqlite"
	@echo "make bench-api  what polls and lists cost, beside a bare FastAPI route (minutes)"
	@echo "make bench-start seconds from a claimed job to its first step"
	@echo "make bench-init seconds and memory of every initialization beside stock PEFT's (minutes)"
	@echo "make bench-train DATA=folder-of-gsm8k  training speed and memory beside TRL and HF Trainer (about half an hour)"
	@echo "make bench-rates DATA=folder-of-gsm8k  does every initialization's default rate help on three data sets? (hours); ONLY= SEEDS="
	@echo "make evidence DATA=folder-of-gsm8k  every initialization compared by the service itself: docs/evidence.md (hours; goes on where it was stopped); ONLY= STATE= NICE="
	@echo "make bench-load do fifty clients slow a worker down, and what do streams and recording cost? (minutes)"
	@echo "make gpu-day    on a machine with a GPU: is everything right there, and how fast (ten minutes)"
	@echo "make docs       write what the code knows into the documents: settings, error codes, methods, rates, pictures"
	@echo "make clean      remove what was built here (.venv, .venvs, .state, caches)"

setup: $(READY)

# Made again whenever what is to be installed changes.
$(READY): pyproject.toml requirements/dev.txt requirements/torch.txt requirements/torch-cpu.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "Lorainit needs Python 3.11 or newer as '$(PYTHON)'. Name another one with: make PYTHON=/path/to/python3.11 ..."; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "This Python has no venv module. On Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing Lorainit into $(VENV) (PyTorch and all: minutes on a slow line) ..."
	@$(LOCKED) --requirement requirements/dev.txt
	@# The small build of torch, for processors alone, where pip is configured with a place that has it.
	@if $(LOCKED) --dry-run --requirement requirements/torch-cpu.txt >/dev/null 2>&1; then \
	  $(LOCKED) --requirement requirements/torch-cpu.txt; else $(LOCKED) --requirement requirements/torch.txt; fi
	@$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@

demo: setup
	@$(BIN)/lorainit demo

serve: setup
	@$(BIN)/lorainit serve

test: setup
	@$(BIN)/python tests/conformance/environments.py
	@$(BIN)/python tests/deploy/environment.py
	@$(BIN)/python tests/readers/environments.py
	@$(BIN)/python tests/templates/environment.py
	$(BIN)/python -m pytest -n $(N) --junitxml .test-times.xml

test-times: setup
	@$(BIN)/python -m tests.times

test-quick: setup
	@$(BIN)/python -m tests.quick $(if $(BASE),--base $(BASE))

test-slow: setup
	$(BIN)/python -m pytest -m slow

# Goes on where it was interrupted, as long as the code is the same.
zoo: setup
	$(BIN)/python -m tests.zoo $(if $(ONLY),--only $(ONLY),--write docs/models.md)

# A table of what came of it, and exit code 1 unless every promise of docs/reliability.md was kept.
chaos: setup
	$(BIN)/python -m tests.chaos $(if $(SEED),--seed $(SEED)) $(if $(SECONDS),--seconds $(SECONDS)) \
	  $(if $(KILLS),--kills $(KILLS)) $(if $(MUTANT),--mutant $(MUTANT)) \
	  $(if $(STORAGE),--storage $(STORAGE)) $(if $(DATABASE),--database $(DATABASE))

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mypy --config-file tests/mypy.ini --cache-dir .mypy_cache/tests tests benchmarks
	$(BIN)/lint-imports
	$(BIN)/lorainit migrate --check

check: lint test
	@$(BIN)/python tests/deploy/audit.py --or-skip

# Asks an advisory service on the network; fails when it cannot. docs/decisions/0020
audit: setup
	$(BIN)/python tests/deploy/audit.py

licences: setup
	@$(BIN)/python tests/deploy/licences.py

lock:
	@$(PYTHON) tests/deploy/lock.py $(if $(UPGRADE),--upgrade)

bench-api: setup
	$(BIN)/python benchmarks/api.py --write docs/operations.md

bench-init: setup
	$(BIN)/python benchmarks/bench_init.py --write docs/methods/benchmark.md

# The competitors get an environment of their own first: .venvs/competitors.
bench-train: setup
	@test -n '$(DATA)' || { echo "Say where GSM8K's train.jsonl and test.jsonl are: make bench-train DATA=folder"; exit 1; }
	$(BIN)/python benchmarks/bench_train.py --data '$(DATA)' --write docs/speed.md
	$(BIN)/python benchmarks/train_group.py --write docs/speed.md

# Goes on where it was interrupted. ONLY and SEEDS are lists: ONLY="pissa loram" SEEDS="0 1 2". Part of it writes no page.
bench-rates: setup
	@test -n '$(DATA)' || { echo "Say where GSM8K's train.jsonl and test.jsonl are: make bench-rates DATA=folder"; exit 1; }
	$(BIN)/python benchmarks/bench_rates.py --data '$(DATA)' $(if $(SEEDS),--seeds $(SEEDS)) \
	  $(if $(ONLY),--only $(ONLY),--write docs/rates.md)

# Goes on where it was interrupted. ONLY is a list of experiments; NICE=19 gives way to other programs.
evidence: setup
	@test -n '$(DATA)' || { echo "Say where GSM8K's train.jsonl and test.jsonl are: make evidence DATA=folder"; exit 1; }
	$(BIN)/python -m benchmarks.evidence --data '$(DATA)' $(if $(STATE),--state '$(STATE)') $(if $(NICE),--nice $(NICE)) \
	  $(if $(ONLY),--only $(ONLY))

# From a claimed job to its first step, beside a process from scratch.
bench-start: setup
	$(BIN)/python benchmarks/first_step.py

bench-load: setup
	$(BIN)/python benchmarks/costs.py --write docs/operations.md
	$(BIN)/python benchmarks/load.py --write docs/operations.md

# On a machine whose .venv has a torch with CUDA. docs/speed-gpu.md has the exit codes: 1 wrong, 2 no GPU, 3 not all tried.
gpu-day: setup
	$(BIN)/python benchmarks/gpu_day.py --write docs/speed-gpu.md

# Exit code 1 if a page has a place that only a person can fill.
docs: setup
	$(BIN)/python -m docs.generate

clean:
	rm -rf $(VENV) .venvs .state .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .test-times.xml *.egg-info
