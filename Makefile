# Every target makes the virtual environment that it needs; nothing outside it is used but $(PYTHON).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LOWEST := .venv-lowest
NEWEST := .venv-newest
MUTANTS := .cache/mutants
INSTALL := -m pip install --quiet --disable-pip-version-check
COMPILE = $(BIN)/uv pip compile --quiet --python-version 3.10 --no-annotate --no-header pyproject.toml

# What the caller has active must not leak in.
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV PIP_CONSTRAINT PIP_TARGET PIP_PREFIX PIP_USER PIP_REQUIRE_VIRTUALENV
export PYTHONNOUSERSITE := 1
export QUERY

.PHONY: help demo test docs soak lint type format mutants constraints test-lowest test-newest clean
.NOTPARALLEL:
.DEFAULT_GOAL := help

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 14

demo: $(VENV)/.demo ## search the handbook in examples/documents; QUERY="..." asks one question
	$(BIN)/python examples/retriever_chain.py --small $(if $(QUERY),--query "$$QUERY")

test: $(VENV)/.dev ## run the tests; ARGS="..." goes to pytest
	$(BIN)/python -m pytest $(ARGS)

docs: $(VENV)/.docs ## build the site, without a network, into .cache/site; every link is checked
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "Open .cache/site/index.html."

soak: $(VENV)/.dev ## try what can go wrong, and say what was lost
	PYTHONPATH=tests $(BIN)/python -m pytest -p faults -m "" $(ARGS)

lint: $(VENV)/.dev ## check style, formatting, what may import what, and the image's files
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo --cache-dir .cache/imports
	$(BIN)/hadolint Dockerfile
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec compose.yaml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml

type: $(VENV)/.dev ## check types
	$(BIN)/mypy

format: $(VENV)/.dev ## rewrite the files in the project's style
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

# The tests of chroma/lexical are in tests/chroma/test_lexical.py, unless TESTS="..." names others.
mutants: TESTS ?= $(subst /_,/,tests/$(dir $(ARGS)))test_$(patsubst _%,%,$(notdir $(ARGS))).py
mutants: $(VENV)/.dev ## change ARGS=module at one place at a time; list the changes that its tests miss
	rm -rf $(MUTANTS)
	mkdir -p $(MUTANTS)
	cp -r benchmarks examples langchain_bge_dense tests pyproject.toml $(MUTANTS)
	printf '%s\n' '[mutmut]' source_paths=langchain_bge_dense also_copy= '    benchmarks' '    examples' \
	    process_isolation=forkserver only_mutate=langchain_bge_dense/$(ARGS).py \
	    pytest_add_cli_args_test_selection= $(TESTS:%='    %') > $(MUTANTS)/setup.cfg
	cd $(MUTANTS) && for command in run results export-cicd-stats; do \
	    $(abspath $(BIN))/mutmut $$command || exit; \
	done
	cat $(MUTANTS)/mutants/mutmut-cicd-stats.json

constraints: $(VENV)/.dev ## pin what pyproject.toml now asks for: newest and lowest versions
	$(COMPILE) --universal --all-extras --output-file constraints.txt
	$(COMPILE) --upgrade --resolution lowest-direct --extra test --output-file constraints-lowest.txt
	for file in constraints.txt constraints-lowest.txt; do \
	    grep -vE '^(cuda|nvidia|triton)\b' $$file > $$file.tmp && mv $$file.tmp $$file; \
	done  # torch itself pins these

test-lowest: $(LOWEST)/.lowest ## run the tests on the lowest versions allowed; with Python 3.10
	$(LOWEST)/bin/python -m pytest $(ARGS)

test-newest: $(NEWEST)/torch.txt ## run the tests on the newest versions allowed, and PyTorch as pinned
	$(NEWEST)/bin/python $(INSTALL) --upgrade --upgrade-strategy eager --constraint $< --editable ".[test]"
	$(NEWEST)/bin/python -m pip list --format=freeze
	$(NEWEST)/bin/python -m pytest $(ARGS)

# A newer PyTorch may come with gigabytes of CUDA where the pinned one is at hand without.
$(NEWEST)/torch.txt: constraints.txt | $(NEWEST)/.made
	grep '^torch==' $< > $@

$(VENV)/.demo: EXTRAS := demo
$(VENV)/.dev: EXTRAS := dev,test
$(VENV)/.docs: EXTRAS := docs
$(LOWEST)/.lowest: EXTRAS := test
$(VENV)/.demo $(VENV)/.dev $(VENV)/.docs: pyproject.toml constraints.txt | $(VENV)/.made
$(LOWEST)/.lowest: pyproject.toml constraints-lowest.txt | $(LOWEST)/.made
$(VENV)/.demo $(VENV)/.dev $(VENV)/.docs $(LOWEST)/.lowest:
	@echo "Installing .[$(EXTRAS)] into $(@D); the first time takes minutes, most of it PyTorch."
	$(@D)/bin/python $(INSTALL) --constraint $(word 2,$^) --editable ".[$(EXTRAS)]"
	@touch $@

%/.made:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $*
	@touch $@

clean: ## remove everything that these targets made
	rm -rf $(VENV) $(LOWEST) $(NEWEST) .cache build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
