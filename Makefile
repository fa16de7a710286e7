# Everything that people and CI run. Each target makes the virtual environment if it is missing.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test check format test-arm64 clean

demo: $(STAMP)  ## export two real models and run them under a memory cap
	$(BIN)/python -m benchmarks.demo

test: $(STAMP)  ## all tests but the emulated ones
	$(BIN)/python -m pytest

check: $(STAMP)  ## lint, types, import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)  ## rewrite the code in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test-arm64: $(STAMP)  ## the engine on aarch64, emulated where the machine is not one
	$(BIN)/python -m tests.arm64.run $(ARM64_ARGS)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

clean:  ## remove what builds and tests made
	rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache models/exported
