# Every target makes the virtual environment that it needs; nothing outside it is used but $(PYTHON).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LOWEST := .venv-lowest
INSTALL := -m pip install --quiet --disable-pip-version-check

# What the caller has active must not leak in.
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV PIP_CONSTRAINT PIP_TARGET PIP_PREFIX PIP_USER PIP_REQUIRE_VIRTUALENV
export PYTHONNOUSERSITE := 1
export QUERY

.PHONY: help demo test soak lint type format constraints test-lowest clean
.NOTPARALLEL:
.DEFAULT_GOAL := help

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 14

demo: $(VENV)/.demo ## search the handbook in examples/documents; QUERY="..." asks one question
	$(BIN)/python examples/retriever_chain.py --small $(if $(QUERY),--query "$$QUERY")

test: $(VENV)/.dev ## run the tests; ARGS="..." goes to pytest
	$(BIN)/python -m pytest $(ARGS)

soak: $(VENV)/.dev ## try what can go wrong, and say what was lost
	PYTHONPATH=tests $(BIN)/python -m pytest -p faults -m "" $(ARGS)

lint: $(VENV)/.dev ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: $(VENV)/.dev ## check types
	$(BIN)/mypy

format: $(VENV)/.dev ## rewrite the files in the project's style
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

constraints: $(VENV)/.dev ## pin what pyproject.toml now asks for and constraints.txt lacks
	$(BIN)/uv pip compile --quiet --universal --python-version 3.10 --all-extras --no-annotate \
	    --no-header --output-file constraints.txt pyproject.toml
	grep -vE '^(cuda|nvidia|triton)\b' constraints.txt > constraints.tmp  # torch itself pins these
	mv constraints.tmp constraints.txt

test-lowest: $(LOWEST)/.done ## run the tests on the lowest versions that pyproject.toml allows
	$(LOWEST)/bin/python -m pytest $(ARGS)

$(VENV)/.demo: EXTRAS := demo
$(VENV)/.dev: EXTRAS := dev,test
$(VENV)/.demo $(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/.made
	@echo "Installing .[$(EXTRAS)] into $(VENV); the first time takes minutes, most of it PyTorch."
	$(BIN)/python $(INSTALL) --constraint constraints.txt --editable ".[$(EXTRAS)]"
	@touch $@

# FlagEmbedding names no lowest version of datasets.
$(LOWEST)/.done: pyproject.toml constraints.txt | $(LOWEST)/.made
	$(LOWEST)/bin/python $(INSTALL) --constraint constraints.txt uv
	echo 'datasets>=2.19' | \
	    $(LOWEST)/bin/uv pip compile --quiet --resolution lowest-direct --extra test \
	    --python $(LOWEST)/bin/python --output-file $(LOWEST)/lowest.txt pyproject.toml -
	$(LOWEST)/bin/python $(INSTALL) --requirement $(LOWEST)/lowest.txt --editable .
	@touch $@

%/.made:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $*
	@touch $@

clean: ## remove everything that these targets made
	rm -rf $(VENV) $(LOWEST) .cache build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
