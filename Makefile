# Every target works in a fresh clone: the environment is made first, with nothing installed but
# Python 3.11 or newer, git and make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test lint format bench clean

demo: $(VENV)/.demo
	$(BIN)/memaop-triton demo --output results

test: $(VENV)/.dev
	$(BIN)/python -m pytest

# mypy needs the package as it is once installed, with the kernels inside.
lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/types && mkdir -p build/types
	cp -R memaop_triton build/types/ && cp -R kernels build/types/memaop_triton/
	cd build/types && ../../$(BIN)/mypy -p memaop_triton --config-file ../../pyproject.toml

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.dev
	$(BIN)/python -m pytest bench -k cpu

clean:
	rm -rf $(VENV) build results .pytest_cache .mypy_cache .ruff_cache

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.%: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) -e '.[$*]'
	touch $@
