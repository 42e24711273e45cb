# make test, make bench: set up everything in .venv, then run. make gpu-first, gpu-second: on a machine with a GPU, with
# PYTHON as it is.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml CMakeLists.txt $(shell find csrc)

.PHONY: test test-rest test-all test-slow triton-matrix cuda-host bench bench-all pages notebooks wheels docs resources rng-report lint format clean gpu-first gpu-second gpu-join gpu-wheels

# ARGS: for pytest (make test ARGS="-k masking") or for the benchmark (make bench ARGS="--op mask_tokens"). A file of
# tests goes to one process, which compiles and runs what its tests share once.
PYTEST = $(BIN)/python -m pytest tests benchmarks --benchmark-disable -n auto --maxprocesses 8 --dist loadfile
test: $(VENV)/built $(if $(ARGS),,cuda-host)
	$(if $(ARGS),$(BIN)/python -m pytest $(ARGS),$(PYTEST) -m "not full and not slow")

# What `make test` leaves out: the tests that are marked full. test-all: both, as in CI.
test-rest: $(VENV)/built $(VENV)/notebooks cuda-host
	$(PYTEST) -m "full and not slow"

test-all:
	$(MAKE) test ARGS=
	$(MAKE) test-rest

# What takes long and shows little more.
test-slow: $(VENV)/built $(VENV)/notebooks cuda-host triton-matrix
	$(PYTEST) -m slow

# Each branch of the Triton kernels compiled for sm_80, sm_90 and sm_100 by the oldest Triton that is supported, which
# comes with torch 2.11, and by the newest: beside the one in .venv, not instead of it. About four minutes each.
TRITONS ?= 3.6.0 3.9.0
triton-matrix: $(VENV)/built
	for version in $(TRITONS); do \
	  test -d build/triton-$$version || $(BIN)/python -m pip install --disable-pip-version-check -q --no-deps \
	    --target build/triton-$$version triton==$$version || exit 1; \
	  PYTHONPATH=$(CURDIR)/build/triton-$$version $(BIN)/python -m pytest -q tests/core/test_triton_resources.py -k sm_ || exit 1; \
	done

# The CUDA kernels for the host, under two sanitizers; the tests build them too where they are missing.
cuda-host: $(VENV)/built
	@! command -v "$${CXX:-g++}" > /dev/null || PYTHONPATH=tests $(BIN)/python -m cuda_host.run

# Every op in one or two cases, four minutes on two idle cores; bench-all: all cases. Both write into a folder that git
# ignores; with ARGS=--publish into benchmarks/results, and `make pages` then brings the tables of README.md and docs/ up to
# date.
bench: $(VENV)/built
	$(BIN)/python -m benchmarks $(ARGS)

bench-all: $(VENV)/built
	$(BIN)/python -m benchmarks --all $(ARGS)

# What README.md and docs/ say that a script can write: tables of benchmarks/results, diagrams of the code, llms.txt.
pages: $(VENV)/built
	$(BIN)/python -m scripts.pages

# Registers, spills, wide accesses and more of the machine code of the kernels, which needs no GPU.
resources: $(VENV)/built
	$(BIN)/python -m benchmarks.resources benchmarks/results/cuda_kernels.md
	$(BIN)/python -m benchmarks.triton_resources benchmarks/results/triton_kernels.md

# The quality of the random streams over 2^29 draws each, as a table and a plot: some minutes.
rng-report: $(VENV)/built
	$(BIN)/python -m benchmarks.random_numbers.report $(ARGS)

# The site, into build/site; fails on a link or an anchor that leads nowhere, and on a docstring that names what is not there.
docs: $(VENV)/built
	$(BIN)/python -m pip install --disable-pip-version-check -q -r requirements/docs.txt
	@mkdir -p build
	@$(BIN)/zensical build --strict > build/docs.log 2>&1 || { cat build/docs.log; exit 1; }
	@cat build/docs.log
	@! grep -q "^griffe:" build/docs.log

# Notebooks of the examples, into build/notebooks; with ARGS="--execute masked_lm" with the results of a run.
notebooks: $(VENV)/built $(VENV)/notebooks
	$(BIN)/python -m scripts.notebooks build/notebooks $(ARGS)

# Wheels of every Python from 3.10 to 3.14 that is found, into build/wheels/repaired, and an audit of them. The kernels
# are compiled once. PYTHONS: other interpreters.
wheels: $(VENV)/requirements
	$(BIN)/python -m pip install --disable-pip-version-check -q -r requirements/wheels.txt
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python scripts/wheels.py build $(PYTHONS)

lint: $(VENV)/requirements
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' | xargs $(BIN)/clang-format --dry-run --Werror

format: $(VENV)/requirements
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' | xargs $(BIN)/clang-format -i

clean:
	rm -rf $(VENV) build sslkernels/_C.*.so *.egg-info

$(VENV)/requirements: requirements/dev.txt requirements/peers.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "Python 3.10 or newer is needed; choose one with: make PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "$(PYTHON) cannot make a virtual environment (on Debian: apt install python3-venv)"; exit 1; }
	$(BIN)/python -m pip install --disable-pip-version-check -q -r requirements/dev.txt
	$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps -r requirements/peers.txt
	@touch $@

$(VENV)/notebooks: requirements/notebooks.txt $(VENV)/requirements
	$(BIN)/python -m pip install --disable-pip-version-check -q -r requirements/notebooks.txt
	@touch $@

# A compiler is not required: without one the package runs on its reference and Triton backends.
$(VENV)/built: $(VENV)/requirements $(SOURCES)
	@export PATH="$(CURDIR)/$(BIN):$$PATH"; \
	if command -v "$${CXX:-c++}" > /dev/null; then \
	  echo "building the extension"; export SSLKERNELS_BUILD_EXT=1; \
	else \
	  echo "no C++ compiler ($${CXX:-c++}) was found: the cpu and cuda backends are left out"; \
	fi; \
	$(BIN)/python -m pip install --disable-pip-version-check -q --no-build-isolation --no-deps -e .
	@touch $@

# On a machine with a GPU, with PYTHON as it is, which must have a torch with CUDA; nothing is installed but the peers that
# are in wheels/, and no network is needed. At most 6 minutes each; OUT: the folder of the results.
gpu-first gpu-second:
	$(PYTHON) -m benchmarks.gpu $(@:gpu-%=%) $(ARGS)

# Joins what came back, FROM one or more folders, into benchmarks/results.
gpu-join:
	$(PYTHON) -m benchmarks.gpu join $(FROM)

# Downloads the peers of the benchmark matrix into wheels/, for a GPU machine without a network, where `make gpu-second`
# installs them. GPU_PYTHON: the version on that machine.
GPU_PYTHON ?= 3.12
gpu-wheels:
	$(PYTHON) -m pip download --disable-pip-version-check -q --no-deps --only-binary=:all: --python-version $(GPU_PYTHON) \
	  -d wheels -r requirements/gpu_peers.txt
