# Two commands: `make train` trains a model, `make test` tests the package. Needs Python >= 3.11 and make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
RECIPE := recipes/pretrain_clm

.DEFAULT_GOAL := help
.PHONY: help install train test test-all quality style clean

help: ## Show the commands.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(INSTALLED) ## Make the virtual environment and install everything into it.

# torch first and pinned: a build without a GPU where the machine offers one, and the same everywhere else.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "hf_schatten needs Python 3.11 or newer, and $(PYTHON) is " + sys.version.split()[0] + ": set PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

train: $(INSTALLED) ## Pretrain a small GPT-2 with --optim schatten_p; ARGS="--max_steps 100" passes arguments on.
	$(BIN)/python $(RECIPE)/pretrain_clm.py $(RECIPE)/gpt2_stdlib.yaml $(ARGS)

test: $(INSTALLED) ## Run the tests, without the slow ones.
	$(BIN)/python -m pytest -m 'not slow' $(ARGS)

test-all: $(INSTALLED) ## Run all tests.
	$(BIN)/python -m pytest $(ARGS)

quality: $(INSTALLED) ## Check lint, format and types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

style: $(INSTALLED) ## Fix lint and format where a tool can.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## Remove the environment, caches and outputs.
	rm -rf $(VENV) outputs build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
