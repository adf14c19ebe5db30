# `make demo` and `make test` work from a fresh clone: Python 3.11 or newer and make are enough.
# With a C++ compiler the native core is built; without one everything runs on plain PyTorch.
#
#   make demo | test | check | test-all | bench | docs | native | clean
#
# PYTHON chooses the interpreter, VENV the place of the environment.

PYTHON ?= python3
VENV ?= .venv
# Linux wheels of torch on PyPI bring gigabytes of CUDA libraries; this index has the same version without them.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check
NATIVE := $(wildcard CMakeLists.txt native/*)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-all check bench docs native clean

help:
	@sed -n 's/^# \{0,1\}//p;/^$$/q' Makefile

demo: $(VENV)/installed
	$(BIN)/outrider demo

test: $(VENV)/installed
	$(BIN)/pytest -m "not slow"

test-all: $(VENV)/installed
	$(BIN)/pytest

check: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/installed
	$(BIN)/outrider bench

docs: $(VENV)/installed
	$(BIN)/python docs/build.py

native:
	rm -rf build $(VENV)/installed
	$(MAKE) $(VENV)/installed

clean:
	rm -rf build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests docs recipes -name __pycache__ -type d -prune -exec rm -rf {} +

# Python files are used where they lie, so only these make a new installation necessary.
$(VENV)/installed: $(VENV)/torch pyproject.toml $(NATIVE)
	@echo "installing outrider and building its native core"
	$(PIP) install -c constraints.txt --no-build-isolation --editable '.[dev]'
	@$(BIN)/python -c 'import outrider._native' 2> $(VENV)/native.log || { rm -rf build; \
	  echo 'note: the native core was not built, plain PyTorch runs instead (slower). With a C++ compiler: make native'; }
	@touch $@

# The build tools are installed once and for all: an isolated build would fetch them every time.
$(VENV)/torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"outrider needs Python 3.11 or newer, got {sys.version.split()[0]}: make PYTHON=/path/to/python")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing torch and the build tools"
	$(PIP) install -c constraints.txt --no-deps --retries 2 --extra-index-url $(TORCH_INDEX) torch
	$(PIP) install -c constraints.txt scikit-build-core nanobind cmake ninja
	@touch $@
