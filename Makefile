# make test, make bench: set up everything in .venv, then run. make gpu: on a machine with a GPU, with PYTHON as it is.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml CMakeLists.txt $(shell find csrc)

.PHONY: test bench lint format clean gpu gpu-build gpu-test gpu-sanitize gpu-bench gpu-record

# ARGS: for pytest (make test ARGS="-k masking") or for the benchmark (make bench ARGS="--op mask_tokens").
test: $(VENV)/built
	$(BIN)/python -m pytest $(or $(ARGS),tests benchmarks --benchmark-disable)

bench: $(VENV)/built
	$(BIN)/python -m benchmarks $(ARGS)

lint: $(VENV)/requirements
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' | xargs $(BIN)/clang-format --dry-run --Werror

format: $(VENV)/requirements
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' | xargs $(BIN)/clang-format -i

clean:
	rm -rf $(VENV) build sslkernels/_C.*.so *.egg-info

$(VENV)/requirements: requirements/dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "Python 3.10 or newer is needed; choose one with: make PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "$(PYTHON) cannot make a virtual environment (on Debian: apt install python3-venv)"; exit 1; }
	$(BIN)/python -m pip install --disable-pip-version-check -q -r requirements/dev.txt
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

# No virtual environment and no network: PYTHON must have torch, pytest, pytest-benchmark, rich, matplotlib, and for the
# build setuptools, pybind11, cmake, ninja. COMMIT=...: the commit of a tree without git. OUT: folder for the results.
gpu:
	$(PYTHON) -m benchmarks.gpu all

gpu-build gpu-test gpu-sanitize gpu-record:
	$(PYTHON) -m benchmarks.gpu $(@:gpu-%=%) $(if $(ARGS),-- $(ARGS))

# PARTS: some of the matrix, as in make gpu-bench PARTS="mask logits-1"; each takes less than 8 minutes.
gpu-bench:
	$(PYTHON) -m benchmarks.gpu bench $(PARTS)
