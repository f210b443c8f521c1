# Two commands: `make train` trains a model, `make test` tests the package. Needs Python >= 3.11 and make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# What is installed: for training alone, and for the tests and linters as well.
TRAINING := $(VENV)/.installed-recipes
DEVELOPMENT := $(VENV)/.installed-dev
INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt
RECIPE := recipes/pretrain_clm
PACKAGES := outputs/package
# A process for each core. It takes neighbouring tests, which share fixtures, and at the end tests of slower processes.
PARALLEL := --numprocesses logical --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help install train test test-all quality style package clean

help: ## Show the commands.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(DEVELOPMENT) ## Make the virtual environment and install everything into it.

# torch first and pinned: a build without a GPU where the machine offers one, and the same everywhere else.
$(TRAINING): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "hf_schatten needs Python 3.11 or newer, and $(PYTHON) is " + sys.version.split()[0] + ": set PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) torch
	$(INSTALL) --editable '.[recipes]'
	@touch $@

$(DEVELOPMENT): $(TRAINING)
	$(INSTALL) --editable '.[dev]'
	@touch $@

train: $(TRAINING) ## Pretrain a small GPT-2 with --optim schatten_p; ARGS="--max_steps 100" passes arguments on.
	$(BIN)/python $(RECIPE)/pretrain_clm.py $(RECIPE)/gpt2_stdlib.yaml $(ARGS)

test: $(DEVELOPMENT) ## Run the tests on all cores, without the slow ones.
	$(BIN)/python -m pytest $(PARALLEL) -m 'not slow' $(ARGS)

test-all: $(DEVELOPMENT) ## Run all tests, on all cores.
	$(BIN)/python -m pytest $(PARALLEL) $(ARGS)

quality: $(DEVELOPMENT) ## Check lint, format and types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

style: $(DEVELOPMENT) ## Fix lint and format where a tool can.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

package: $(DEVELOPMENT) ## Build the source distribution and the wheel, and check what a package index would show.
	rm -rf $(PACKAGES)
	$(BIN)/python -m build --no-isolation --outdir $(PACKAGES) .
	$(BIN)/twine check --strict $(PACKAGES)/*

clean: ## Remove the environment, caches and outputs.
	rm -rf $(VENV) outputs build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
