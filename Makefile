# One virtual environment, made when it is first needed; every target works on a bare machine.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH ?= torch==2.13.0

SOURCES := setup.py pyproject.toml $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu*')

.PHONY: demo test lint format bench gpu-check build info clean

demo: $(VENV)/built
	$(BIN)/python -m lrkernels demo

test: $(VENV)/built
	$(BIN)/python -m pytest

lint: $(VENV)/built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(filter %.h %.cpp %.cu %.cuh,$(SOURCES))

format: $(VENV)/built
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(filter %.h %.cpp %.cu %.cuh,$(SOURCES))

bench: $(VENV)/built
	$(BIN)/python benchmarks/run.py

# Without a virtual environment: a machine with a GPU may have no network. PYTHON is one that has torch with CUDA.
gpu-check:
	$(PYTHON) benchmarks/gpu_check.py

info: $(VENV)/built
	$(BIN)/python -m lrkernels info

build: $(VENV)/built

# torch first: without build isolation the extension is compiled against the torch that runs it. The CUDA kernels, which
# take a minute or two, are left to the second build.
$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip "setuptools>=77" wheel ninja numpy "$(TORCH)"
	LRKERNELS_CUDA=0 $(BIN)/python -m pip install --quiet --no-build-isolation -e '.[dev]'
	touch $@

$(VENV)/built: $(VENV)/installed $(SOURCES)
	$(BIN)/python setup.py --quiet build_ext --inplace
	touch $@

clean:
	rm -rf build $(VENV) *.egg-info lrkernels/*.so
