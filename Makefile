# `make demo` and `make test` work on a machine with only git, make and Python >= 3.11.
# VENV=dir puts the virtual environment elsewhere; PYTHON=python3.12 picks an interpreter.
VENV ?= .venv
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test test-slow lint format table methods-table clean

demo: $(VENV)/.installed  ## run the quickstart experiment
	$(BIN)/fedprompt run quickstart

test: $(VENV)/.installed  ## the default tests
	$(BIN)/python -m pytest

test-slow: $(VENV)/.installed  ## the long end-to-end tests
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.installed  ## lint, format and type checks
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed  ## fix what the linter can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

methods-table: $(VENV)/.installed  ## every method on the embedded data, three seeds
	$(BIN)/python scripts/run_table.py configs/sweep/all_methods.yaml

table: $(VENV)/.installed  ## the table of the README
	$(BIN)/python scripts/run_table.py configs/sweep/readme_table.yaml

clean:  ## remove the virtual environment and caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/.installed: pyproject.toml
	@test -n "$(PYTHON)" || { echo "make: needs Python >= 3.11; set PYTHON=/path/to/python3.11"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@
