# make run    a working playground and gateway on this machine, with nothing to download but Python packages
# make test   everything that is checked
# make help   the rest

PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	if $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then command -v $$p; break; fi; done)
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
HOST ?= 127.0.0.1
PORT ?= 8080

# PyTorch is for the tests that need it. On Linux the ordinary index gives the build for CUDA, which is several GB: to
# get the small one, give the address of PyTorch's index of CPU builds, as make test TORCH_INDEX=...
TORCH_VERSION ?= 2.13.0
TORCH_INDEX ?=

.DEFAULT_GOAL := help
.PHONY: help run test fuzz check bench screenshot clean

help: ## Say what there is to make
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

run: $(VENV)/.run ## Serve the gateway and the playground with the demo upstream
	$(BIN)/tidegate serve --demo --host $(HOST) --port $(PORT)

test: check ## Check style, types, layers, then run every test
	$(BIN)/pytest $(PYTEST_ARGS)

fuzz: $(VENV)/.dev ## Search for new cases that break a property: make fuzz PYTEST_ARGS=tests/model
	$(BIN)/pytest --hypothesis-profile=fuzz -m hypothesis $(PYTEST_ARGS)

check: $(VENV)/.dev ## Check style, types, layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.dev ## Measure the edge guard's speed beside other checks
	$(BIN)/python benchmarks/edge.py

screenshot: $(VENV)/.dev ## Take the README's screenshot from the running playground
	$(BIN)/python docs/screenshot.py

clean: ## Remove what was made here; the decisions that were kept stay
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist

$(VENV)/.made:
	@test -n "$(PYTHON)" || { echo "Tidegate needs Python 3.11 or newer: install it, or say where it is with make PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	|| { echo "Tidegate needs Python 3.11 or newer, and $(PYTHON) is not: say where one is with make PYTHON=..."; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "python -m venv does not work: on Debian, apt-get install python3-venv"; exit 1; }
	@touch $@

$(VENV)/.run: $(VENV)/.made pyproject.toml
	@echo "installing Tidegate into $(VENV) (once, about a minute)"
	$(PIP) -e .
	@touch $@

# Tests that need torch skip when it cannot be had; so a failure to get it ends nothing.
$(VENV)/.torch: $(VENV)/.made
	@echo "installing PyTorch for the tests that need it (once)"
	@$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "torch==$(TORCH_VERSION)" \
	|| echo "no PyTorch for this machine: its tests will be skipped"
	@touch $@

$(VENV)/.dev: $(VENV)/.run $(VENV)/.torch pyproject.toml
	@echo "installing what the tests need into $(VENV) (once)"
	@if $(BIN)/python -c 'import torch' 2>/dev/null; then $(PIP) -e '.[dev,train,cpu]'; else \
		$(PIP) -e '.[dev]' onnx safetensors scipy scikit-learn matplotlib; fi
	@touch $@
