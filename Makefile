# Each target sets up its own virtual environment: nothing but Python 3.10+ is needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint benchmark

demo: $(VENV)/.installed-examples
	$(BIN)/python examples/quickstart.py

test: lint
	$(BIN)/python -m pytest

lint: $(VENV)/.installed-all
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

benchmark: $(VENV)/.installed-all
	$(BIN)/python benchmarks/cpu_attention.py --out
	$(BIN)/python benchmarks/make_tables.py

$(VENV)/.installed-%: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[$*]"
	touch $@
