# Everything that people and CI run. Each target makes the virtual environment if it is missing.
#   make test PYTHON=python3.13    with another interpreter, in an environment of its own
PYTHON ?= python3
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2> /dev/null)
VENV ?= .venv$(if $(filter-out file,$(origin PYTHON)),-$(VERSION))
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-$(VERSION)
LATEST := .venv-latest$(if $(filter-out file,$(origin PYTHON)),-$(VERSION))
LATEST_STAMP := $(LATEST)/.installed-$(VERSION)
TORCH := .venv-torch$(if $(filter-out file,$(origin PYTHON)),-$(VERSION))
TORCH_STAMP := $(TORCH)/.installed-$(VERSION)
DOCS := .venv-docs$(if $(filter-out file,$(origin PYTHON)),-$(VERSION))
DOCS_STAMP := $(DOCS)/.installed-$(VERSION)
# Which tests `make test-latest` runs.
LATEST_TESTS ?= tests/engine
# What `make coverage` measures with.
COVERAGE_TESTS ?= tests/engine/format tests/engine/planning tests/engine/storage tests/engine/pipeline tests/engine/model
WORKERS ?= $(shell nproc)
# Where it is set, each of the programs that the tests start would compile all modules anew.
unexport PYTHONDONTWRITEBYTECODE
PYTEST := -m pytest --numprocesses $(WORKERS) --dist loadgroup

.PHONY: help demo test test-slow test-requests test-survey test-all test-latest test-torch test-arm64 coverage mutants check format clean test-page serve-demo docs fuzz test-faults attacks simulate test-system soak kills cluster-demo

demo: $(STAMP)  ## export two real models and run them under a memory cap
	$(BIN)/python -m benchmarks.demo

serve-demo: $(STAMP)  ## serve two real models in one memory cgroup of 300 MB, and call them; SERVE_DEMO_ARGS=--once ends then
	$(BIN)/python -m benchmarks.serve_demo $(SERVE_DEMO_ARGS)

cluster-demo: $(STAMP)  ## three nodes of unequal budgets on this machine run BERT-Large and SmolLM2 together
	$(BIN)/python -m benchmarks.cluster_demo

test: $(STAMP)  ## all tests but the slow, the surveys and the emulated ones
	$(BIN)/python $(PYTEST) -m "not slow and not survey"

test-slow: $(STAMP)  ## the tests that take seconds or repeat a faster one with other values
	$(BIN)/python $(PYTEST) -m "slow and not survey"

simulate: $(STAMP)  ## the pipeline under seeded schedules, disks and memory, and planted faults; SIMULATE_ARGS="--seed N" replays one
	$(BIN)/python -m tests.simulation $(or $(SIMULATE_ARGS),--seconds 45)

test-requests: $(STAMP)  ## 10,000 malformed requests to a server
	PIPELOAD_TEST_REQUESTS=10000 $(BIN)/python -m pytest -m slow tests/integration/test_malformed_requests.py -s

fuzz: $(STAMP)  ## strange inputs for every reader of strangers' files, for a minute; FUZZ_ARGS has targets, --seconds, --seed
	$(BIN)/python -m tests.fuzz $(FUZZ_ARGS)

test-faults: $(STAMP)  ## every fault in turn: hours; FAULTS_ARGS='run --kind read' tries a part
	$(BIN)/python -m tests.faults $(FAULTS_ARGS)

attacks: $(STAMP)  ## attacks on everything that a stranger gives, each refused or held; they are in `make test` too
	$(BIN)/python -m tests.attacks

test-survey: $(STAMP)  ## one model family, and one kind of ONNX file, after another: an hour or more
	$(BIN)/python $(PYTEST) -m survey

test-all: test test-slow test-survey

test-latest: $(STAMP) $(LATEST_STAMP)  ## the engine and the demo's caps with the newest packages that pyproject.toml allows
	PIPELOAD_TEST_MODELS=$$($(BIN)/python -m tests.models) $(LATEST)/bin/python $(PYTEST) -m "not slow and not survey" $(LATEST_TESTS)
	$(BIN)/python -m benchmarks.demo --only-export
	$(LATEST)/bin/python -m benchmarks.demo

test-torch: $(TORCH_STAMP)  ## exports with transformers 5 or newer, by the exporter of torch
	$(TORCH)/bin/python $(PYTEST) tests/exporter/source/test_by_torch.py

coverage: $(STAMP)  ## branch coverage of pipeline, storage, format and planning by their tests: 100 %, or the missing branches; COVERAGE_ARGS=--keep keeps the counts
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[coverage]'
	$(BIN)/python -m tests.proof.branches $(COVERAGE_TESTS) --workers $(WORKERS) $(COVERAGE_ARGS)

mutants: $(STAMP)  ## one fault after another in seven modules of pipeline and planning: does a test see each? MUTANTS_ARGS=--keep keeps the counts
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[mutants]'
	$(BIN)/python -m tests.proof.mutants --workers $(WORKERS) $(MUTANTS_ARGS)

test-arm64: $(STAMP)  ## the engine on aarch64, emulated where the machine is not one
	$(BIN)/python -m tests.arm64.run $(ARM64_ARGS)

test-page: $(STAMP)  ## the server's page in the system's Chromium; installs Playwright, 165 MB, into the environment
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[browser]'
	$(BIN)/python -m pytest tests/integration/test_page.py

test-system: $(STAMP)  ## faults of the system made for real: disks, cgroups, limits, kills, allocators; SYSTEM_ARGS=--short takes a minute
	$(BIN)/python -m tests.system $(SYSTEM_ARGS)

soak: $(STAMP)  ## processes at random budgets, peak and answers checked, for HOURS (8); goes on where the last soak ended
	$(BIN)/python -m tests.soak --hours $(or $(HOURS),8) $(SOAK_ARGS)

kills: $(STAMP)  ## nodes of a cluster killed at 200 random moments; KILLS_ARGS="--kills 20 --seed 7"
	$(BIN)/python -m tests.kills $(KILLS_ARGS)

docs: $(DOCS_STAMP)  ## the site of docs/ in build/site; a link that leads nowhere is an error
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict --quiet
	@echo "The site is build/site/index.html; $(DOCS)/bin/mkdocs serve shows it while you write."

check: $(STAMP)  ## lint, types, import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)  ## rewrite the code in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(STAMP): pyproject.toml constraints.txt
	@.ci/install $(PYTHON) $(VENV) full

$(LATEST_STAMP): pyproject.toml
	@.ci/install $(PYTHON) $(LATEST) latest

$(TORCH_STAMP): pyproject.toml
	@.ci/install $(PYTHON) $(TORCH) torch

$(DOCS_STAMP): pyproject.toml constraints.txt
	@.ci/install $(PYTHON) $(DOCS) docs

help:  ## these lines
	@sed -n 's/^\([a-z0-9-]*\):.*  ## \(.*\)/\1@\2/p' Makefile | column -t -s @

clean:  ## remove what builds and tests made
	rm -rf .venv .venv-* dist build .pytest_cache .mypy_cache .ruff_cache models/exported
