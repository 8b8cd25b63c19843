# SPDX-License-Identifier: Apache-2.0
# Each target makes the virtual environment it needs; python3, a C++ compiler and make are enough to start.
#
#   make test TORCH=torch==2.11.0
#   make test WORKERS=0    in one process
#   make test TESTS=tests/test_web.py TEST_EXTRAS=test,demo,web-test
#   make test TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
DEMO ?=
TESTS ?= tests
TEST_EXTRAS ?= test,demo
WORKERS ?= 2
# Files in their order: those of few tests, which take longest, would come last, with nothing left to run beside them.
PYTEST = $(VENV)/bin/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check

# Installing again is due when what is compiled or declared changes; edits to Python files show through the editable install.
SOURCES := pyproject.toml setup.py $(wildcard csrc/*.cpp csrc/*/*)
TORCH_STAMP := $(VENV)/.torch-$(shell printf '%s' '$(TORCH)' | tr -c 'A-Za-z0-9.+' '_')
CXX_FILES := $(wildcard csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cuh csrc/*/*.cu tests/cuda_emulation/*.h tests/cuda_emulation/*.cu)

.PHONY: help demo test coverage bench docs lint format clean

help:
	@echo 'make demo    fit one network twice, on naive PyTorch and on the fused ops, and compare'
	@echo 'make test    run the test suite'
	@echo 'make coverage  the same, with the lines and branches of the package that no test reached'
	@echo 'make bench   run the benchmarks'
	@echo 'make docs    build the site into build/docs'
	@echo 'make lint    check formatting, style and types'
	@echo 'make format  format Python and C++'
	@echo 'make clean   remove the virtual environment and everything built'

demo: $(VENV)/.demo
	$(VENV)/bin/fused-inpaint demo $(DEMO)

test: $(VENV)/.test
	$(PYTEST) $(TESTS)

coverage: $(VENV)/.test
	$(PYTEST) --cov --cov-report=term-missing:skip-covered $(TESTS)

bench: $(VENV)/.test
	$(VENV)/bin/python -m pytest benchmarks --benchmark-only -q

# -E: a page that did not change must show its warnings again.
docs: $(VENV)/.docs
	$(VENV)/bin/python -m sphinx -E -q -W --keep-going -c docs . build/docs

lint: $(VENV)/.lint
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $(CXX_FILES)
	$(VENV)/bin/mypy fused_inpaint models

format: $(VENV)/.lint
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(CXX_FILES)

clean:
	rm -rf $(VENV) build dist *.egg-info fused_inpaint/_C*.so fused_inpaint/_build.json

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo 'make: PYTHON must be Python 3.10 or newer, got "$(PYTHON)"' >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo 'make: $(PYTHON) cannot make virtual environments; on Debian or Ubuntu: apt install python3-venv' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(TORCH_STAMP): | $(VENV)/bin/python
	$(PIP) install -q $(TORCH)
	@rm -f $(VENV)/.torch-*
	@touch $@

$(VENV)/.installed: $(TORCH_STAMP) $(SOURCES)
	$(PIP) install -q -e .
	@touch $@

# The package is there already, so this adds the requirements of its extras without compiling it again.
$(VENV)/.demo: EXTRAS := demo
$(VENV)/.test: EXTRAS := $(TEST_EXTRAS)
$(VENV)/.docs: EXTRAS := docs
$(VENV)/.lint: EXTRAS := lint
$(VENV)/.demo $(VENV)/.test $(VENV)/.docs $(VENV)/.lint: $(VENV)/.installed
	$(PIP) install -q 'fused-inpaint[$(EXTRAS)]'
	@touch $@
