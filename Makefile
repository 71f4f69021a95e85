# `make demo` and `make test` work on a machine with only git, make and Python >= 3.11.
# VENV=dir puts the virtual environment elsewhere; PYTHON=python3.12 picks an interpreter.
VENV ?= .venv
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test test-slow test-lowest constraints lint format table methods-table docs docs-pages clean

demo: $(VENV)/.installed  ## run the quickstart experiment
	$(BIN)/fedprompt run quickstart

test: $(VENV)/.installed  ## the default tests, on two processes
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: $(VENV)/.installed  ## the long end-to-end tests, on two processes
	$(BIN)/python -m pytest -m slow -n 2 --dist loadfile --durations=15

test-lowest: $(VENV)-lowest/.installed  ## the default tests with the lowest versions we allow
	$(VENV)-lowest/bin/python -m pytest -n 2 --dist loadfile

lint: $(VENV)/.installed  ## lint, format and type checks
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed  ## fix what the linter can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

methods-table: $(VENV)/.installed  ## every method on the embedded data, three seeds
	$(BIN)/fedprompt sweep all_methods
	$(BIN)/fedprompt compare runs/all_methods --format markdown

table: $(VENV)/.installed  ## the table of the README
	$(BIN)/fedprompt sweep readme_table
	$(BIN)/fedprompt compare runs/readme_table --format markdown

docs: $(VENV)/.docs  ## the documentation as a site, in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

docs-pages: $(VENV)/.installed  ## write every generated file: pages, table of methods, sweep rows
	$(BIN)/python scripts/write_docs.py

constraints: $(VENV)/.installed  ## write the installed versions as the newest tested ones
	$(BIN)/python scripts/write_constraints.py

clean:  ## remove the virtual environment and caches
	rm -rf $(VENV) $(VENV)-lowest site .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/.installed: pyproject.toml constraints/tested.txt
	@test -n "$(PYTHON)" || { echo "make: needs Python >= 3.11; set PYTHON=/path/to/python3.11"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints/tested.txt --editable '.[dev]'
	@touch $@

$(VENV)/.docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints/tested.txt --editable '.[docs]'
	@touch $@

$(VENV)-lowest/.installed: pyproject.toml constraints/lowest.txt
	test -x $(VENV)-lowest/bin/python || $(PYTHON) -m venv $(VENV)-lowest
	$(VENV)-lowest/bin/python -m pip install --quiet --constraint constraints/lowest.txt \
		--editable '.[dev]'
	@touch $@
