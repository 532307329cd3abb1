# Every target works in a fresh clone: the environment is made first, with nothing installed but
# Python 3.11 or newer, git and make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A file's tests run in one process, so that what they share is made once; long ones come first.
PARALLEL := --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test test-all lint format bench sanitize kernel-report gpu gpu-dry docs dist notes clean

demo: $(VENV)/.demo
	$(BIN)/memaop-triton demo --output results

# Under four minutes on two cores: all but what is marked `slow`.
test: $(VENV)/.dev
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow"

# Under twenty: also compiles the kernels for all targets, sanitizes them, builds and installs the
# package, runs groups of processes, and kills and resumes training.
test-all: $(VENV)/.sanitize
	$(BIN)/python -c 'import ttsem.sanitize'
	$(BIN)/python -m pytest $(PARALLEL)

# mypy needs the package as it is once installed, with the kernels and the benchmarks inside. What
# pytest runs is not typed.
lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/types && mkdir -p build/types
	cp -R memaop_triton build/types/ && cp -R kernels bench build/types/memaop_triton/
	cd build/types/memaop_triton/bench && rm -rf microscope results conftest.py \
		suites/test_*.py studies/throttled_link.py
	cd build/types && $(abspath $(BIN))/mypy -p memaop_triton --config-file ../../pyproject.toml

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.dev
	$(BIN)/python -m pytest bench/suites/test_cpu.py

# Executes the kernels by their semantics, without a GPU, and stops at what a GPU lets pass.
sanitize: $(VENV)/.sanitize
	$(BIN)/python -c 'import ttsem.sanitize'
	$(BIN)/python -m pytest $(PARALLEL) tests/sanitize

# Compiles the kernels for GPUs that need not be there: bench/results/kernel_report.md.
kernel-report: $(VENV)/.dev
	$(BIN)/python -m bench.microscope.kernel_report

# The first run on a GPU: ten minutes at most, the page of it last; in RESULTS, or in
# bench/results/<gpu>/. With VENV=none nothing is installed: $(PYTHON) runs this checkout, with the
# packages that it has. Status 0 also where there is no GPU, or time was short; 1 if something failed.
ifeq ($(VENV),none)
FIRST_RUN := $(PYTHON) -m bench.first_run
else
FIRST_RUN := $(BIN)/python -m bench.first_run
gpu gpu-dry: $(VENV)/.dev
endif
gpu:
	$(FIRST_RUN) $(if $(RESULTS),--results "$(RESULTS)")

# The same stages on the CPU, interpreted, on small shapes: in build/gpu-dry.
gpu-dry:
	$(FIRST_RUN) --dry $(if $(RESULTS),--results "$(RESULTS)")

# The documentation as a site, in build/site; a warning is an error. Material for MkDocs advertises
# its successor unless told not to.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# What is published, in dist: the same bytes from every build of a commit, by the same setuptools.
dist: $(VENV)/.publish
	rm -rf dist
	PIP_CONSTRAINT=$(abspath constraints.txt) SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct) \
		$(BIN)/python -m build --outdir dist .
	$(BIN)/python -m twine check --strict dist/*

# The changelog's entry of a version, as the text of a release.
VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
notes:
	@awk '/^## / {found = found || on; on = index($$0, "## [$(VERSION)]") == 1; next} on \
		{print} END {exit !(found || on)}' CHANGELOG.md

clean:
	rm -rf $(VENV) build dist results .pytest_cache .mypy_cache .ruff_cache

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# ttsem asks for Python 3.12 and also runs on 3.11.
$(VENV)/.sanitize: $(VENV)/.dev
	$(PIP) --no-deps --ignore-requires-python ttsem==0.1.0
	touch $@

$(VENV)/.%: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) -e '.[$*]'
	touch $@
