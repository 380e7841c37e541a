# Everything runs in a virtual environment of its own; set VENV= to use another, PYTHON= to choose the interpreter.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO ?= demo-out

.PHONY: help install demo test lint format clean

help:  ## Show the targets.
	@grep -E '^[a-z]+:.*##' Makefile | sed 's/:.*## /\t/'

install: $(VENV)/.installed  ## Install lnsdeploy with everything it can use.

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: install  ## Train, export, emulate, verify and report on real digits; ends with a table.
	$(BIN)/python examples/demo.py --out $(DEMO)

test: install lint  ## Lint, type checks and all tests.
	$(BIN)/pytest -n 2

lint: install  ## Format check, lint and type checks.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: install  ## Format the sources.
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## Remove what the other targets made.
	rm -rf $(VENV) $(DEMO) .mypy_cache .ruff_cache .pytest_cache .hypothesis
