# make demo | test | bench | build | lint | clean
#   TORCH=torch==2.13.0   another torch        VENV=path    another environment
#   PYTHON=python3.12     another Python       JOBS=4       test processes

PYTHON ?= python3
TORCH ?= torch>=2.13
VENV ?= .venv
JOBS ?= 2

BIN := $(VENV)/bin
# One stamp for each value of TORCH, so that a changed value installs again.
TORCH_STAMP := $(VENV)/.torch-$(shell printf '%s' '$(TORCH)' | cksum | cut -d ' ' -f 1)
SOURCES := CMakeLists.txt setup.py $(shell find csrc -type f)

.PHONY: demo test bench build lint clean
.DELETE_ON_ERROR:

demo: build
	$(BIN)/phydi-kernels demo

# One torch thread in each process: the processes share the cores. Triton's interpreter and compiler cannot share one.
test: build
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS)
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/python -m pytest -n $(JOBS) tests/interpreter

bench: build
	OMP_NUM_THREADS=1 $(BIN)/phydi-kernels bench

build: $(VENV)/.built

lint: $(VENV)/.lint-tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(filter %.cpp %.h %.cu %.cuh,$(SOURCES)) $(wildcard tests/*_emulation/*)

clean:
	rm -rf build dist *.egg-info phydi_kernels/lib phydi_kernels/_host*.so
	rm -f $(VENV)/.built $(VENV)/.installed

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "$(PYTHON) must be Python 3.10 or newer: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2> /dev/null || \
	  { echo "$(PYTHON) cannot make a virtual environment: apt install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(TORCH_STAMP): | $(BIN)/python
	rm -f $(VENV)/.torch-*
	$(BIN)/python -m pip install "$(TORCH)"
	touch $@

# The build tools stay in the environment, so that setup.py finds the same ones at each rebuild.
$(VENV)/.installed: $(TORCH_STAMP) pyproject.toml
	$(BIN)/python -m pip install "setuptools>=77" "cmake>=3.24" ninja "pybind11>=2.13"
	PHYDI_NO_BUILD=1 $(BIN)/python -m pip install --no-build-isolation -e ".[demo,test,bench]"
	touch $@

$(VENV)/.built: $(VENV)/.installed $(SOURCES)
	$(BIN)/python setup.py --quiet build_ext --inplace
	# Without a compiler nothing was built: try again at the next call.
	test ! -e phydi_kernels/lib/libphydi_kernels.so || touch $@

$(VENV)/.lint-tools: $(VENV)/.installed
	PHYDI_NO_BUILD=1 $(BIN)/python -m pip install --no-build-isolation -e ".[dev]"
	touch $@
