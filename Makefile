# `make demo` and `make test` set everything up by themselves: a virtual environment with the dependencies, and an
# editable build in it that compiles only what changed. They need Python >= 3.11 and a C++ compiler.
PYTHON ?= python3
VENV ?= .venv
# Build the CUDA library: AUTO (if there is an nvcc), ON or OFF, for these architectures: the fewest that show whether
# every kernel compiles. `make demo` alone builds for the CPU.
CUDA ?= AUTO
CUDA_ARCHS ?= 80-real;90a-real
PYTEST_FLAGS ?= -n auto --maxprocesses 8
# Most of a GPU test is compilation on the host. The processes share the GPU.
GPU_PYTEST_FLAGS ?= -n 8
# E.g. --peers and a CSV file of other libraries' times.
GPU_BENCH_FLAGS ?=
DEMO_FLAGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
EDITABLE = $(PIP) install --no-build-isolation --config-settings=build-dir=build/dev-{cache_tag} --editable
NATIVE := CMakeLists.txt pyproject.toml $(shell find cpu cuda -type f)
CLANG_FORMAT = find cpu cuda tests -name '*.h' -o -name '*.cc' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format

.PHONY: demo test lint build gpu-test bench format clean

demo: $(VENV)/.demo
	$(BIN)/python examples/flax/train.py $(DEMO_FLAGS)

test: lint build
	JAX_PLATFORMS=cpu $(BIN)/pytest $(PYTEST_FLAGS)

lint: $(VENV)/.lint $(VENV)/.tools
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(CLANG_FORMAT) --dry-run -Werror
	$(BIN)/mypy

build: $(VENV)/.dev

# For a machine with a GPU and nvcc, and with jax, pytest, scikit-build-core and pybind11 installed: it needs no package
# registry. -P keeps the source tree, which holds no compiled libraries, from being imported.
gpu-test:
	JAX_NATTEN_CUDA=ON $(PYTHON) -m pip install --quiet --no-build-isolation --no-deps --upgrade \
	  --config-settings=build-dir=build/gpu-objects --target build/gpu .
	PYTHONPATH=$(CURDIR)/build/gpu $(PYTHON) -P -m jax_natten info
	XLA_PYTHON_CLIENT_PREALLOCATE=false PYTHONPATH=$(CURDIR)/build/gpu $(PYTHON) -P -m pytest $(GPU_PYTEST_FLAGS) tests/gpu
	PYTHONPATH=build/gpu $(PYTHON) benchmarks/gpu.py $(GPU_BENCH_FLAGS)

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/cpu.py

format: $(VENV)/.lint
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(CLANG_FORMAT) -i

clean:
	rm -rf build dist demo_output .venv .mypy_cache .pytest_cache .ruff_cache

$(VENV)/.tools: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --upgrade "pip>=25.1"
	$(PIP) install --group build "jax>=0.10" "jaxlib>=0.10"
	touch $@

$(VENV)/.lint: pyproject.toml | $(VENV)/.tools
	$(PIP) install --group lint
	touch $@

$(VENV)/.dev: $(NATIVE) $(VENV)/.tools
	JAX_NATTEN_CUDA=$(CUDA) JAX_NATTEN_CUDA_ARCHS="$(CUDA_ARCHS)" JAX_NATTEN_WERROR=ON $(EDITABLE) ".[demo,test]"
	touch $@

# A developer's build serves the demo too; else the demo gets one without CUDA, and without warnings as errors.
ifneq ($(wildcard $(VENV)/.dev),)
$(VENV)/.demo: $(VENV)/.dev
	touch $@
else
$(VENV)/.demo: $(NATIVE) $(VENV)/.tools
	JAX_NATTEN_CUDA=$(patsubst AUTO,OFF,$(CUDA)) $(EDITABLE) ".[demo]"
	touch $@
endif
