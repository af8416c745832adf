# make demo   train on real handwritten digits with seven speed-ups on, then with all of them off
# make test   the test suite          make lint   ruff and pyright          make docs   this documentation as a site
#
# STACK=composer installs or tests the versions that Composer's last release asks for, STACK=floor the oldest torch.
STACK ?= newest
CONSTRAINTS := constraints/$(STACK).txt
ifeq ($(wildcard $(CONSTRAINTS)),)
$(error STACK=$(STACK) is not a stack; choose one of: $(basename $(notdir $(wildcard constraints/*.txt))))
endif
# Each stack has its own environment, so that trying one leaves the others as they are.
VENV := .venv$(if $(filter newest,$(STACK)),,-$(STACK))
PY := $(VENV)/bin/python

.PHONY: help setup demo test test-all test-fast test-quarter test-stacks faults fuzz soak lint format docs docs-serve docs-tools table composition lock clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# \(make.*\)/\1/p;s/^# \(STACK.*\)/\1/p' Makefile

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml setup.py $(CONSTRAINTS) scripts/setup.sh $(wildcard data/decoding/native/*)
	@VENV=$(VENV) CONSTRAINTS=$(CONSTRAINTS) scripts/setup.sh
	@touch $@

demo: setup
	@$(PY) run.py -f yamls/digits_medium.yaml --compare $(ARGS)

# Four at a time on two cores: a test runs on one thread (tests/conftest.py), and processes wait for each other.
PYTEST := $(PY) -m pytest --numprocesses 4 --dist loadgroup

test: setup
	@$(PYTEST) $(ARGS)

# With what takes minutes beside a test of the same kind: every pair of algorithms, every fault, benchmarks (over an hour).
test-all: setup
	@$(PYTEST) --exhaustive $(ARGS)

test-fast: setup
	@$(PYTEST) -m "not slow" $(ARGS)

# Each algorithm, each engine, resumption and the loaders, for a stack that is not the default.
test-quarter: setup
	@$(PYTEST) -m quarter $(ARGS)

# Whole runs that are stopped, killed, damaged and doubled, each in a process of its own (about ten minutes on two idle cores); a table of
# the outcomes in results/faults.md.
faults: setup
	@$(PYTEST) --exhaustive --table results/faults.md tests/faults $(ARGS)

# Hostile recipes, data files, images and checkpoints, many of each (about ten minutes); a table of what came out in
# results/fuzz.md.
fuzz: setup
	@$(PY) -m pytest --numprocesses 2 --dist loadgroup --exhaustive --table results/fuzz.md tests/fuzz $(ARGS)

# Whether anything grows over 300 epochs and 200 early stops of each loader (some 5 minutes).
soak: setup
	@$(PY) -m benchmarks.soak --json results/soak.json $(ARGS)

# The whole suite on every stack, one after the other.
test-stacks:
	@for stack in $(basename $(notdir $(wildcard constraints/*.txt))); do \
		echo "== $$stack =="; $(MAKE) --no-print-directory test STACK=$$stack || failed="$$failed $$stack"; \
	done; [ -z "$$failed" ] || { echo "failed on:$$failed" >&2; exit 1; }

lint: setup
	@$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check . && $(VENV)/bin/pyright

format: setup
	@$(VENV)/bin/ruff check --fix . ; $(VENV)/bin/ruff format .

# docs/composition.md: what composes with what, ours and Composer's (several minutes).
composition: setup
	@$(PY) scripts/composition.py

# Pins for every extra and every supported Python; names and versions only. Composer's own pins hold for all stacks but
# the newest, for which [tool.uv] in pyproject.toml overrides them; transformers' limit stands in its extra `nlp`.
LOCK := $(VENV)/bin/uv pip compile pyproject.toml --all-extras --universal --no-header --no-annotate --quiet --upgrade
lock: setup
	@$(LOCK) --python-version 3.10 -o constraints/newest.txt
	@echo "transformers<4.54" > .lock.in && $(LOCK) --no-config --python-version 3.10 -c .lock.in -o constraints/composer.txt
	@echo "torch<2.7" >> .lock.in && $(LOCK) --no-config --python-version 3.10 -c .lock.in -o constraints/floor.txt
	@rm .lock.in

# What the extra `docs` names; make setup leaves it out.
DOCS := latex2mathml mkdocs-material "mkdocstrings[python]"
# Material tells of MkDocs 2, which its own requirements exclude.
MKDOCS = NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs

# The site, which also opens from disk. A broken link, or a page outside the navigation, fails.
docs: docs-tools
	@$(MKDOCS) build --strict --quiet && echo "site/index.html"

# The site on this machine alone, built again after each change.
docs-serve: docs-tools
	@$(MKDOCS) serve --strict --dev-addr 127.0.0.1:$(or $(PORT),8000)

docs-tools: setup
	@$(VENV)/bin/uv pip install --quiet --python $(PY) --constraint $(CONSTRAINTS) $(DOCS)

# The tables of algorithms in the README and in docs/algorithms/index.md, from the registry, and of what was measured of each.
table: setup
	@$(PY) -m scripts.table

clean:
	rm -rf .venv .venv-* .cache build dist site *.egg-info
