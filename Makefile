# make demo   train on real handwritten digits with every speed-up on, then with all of them off
# make test   the test suite          make lint   ruff and pyright
PY := .venv/bin/python

.PHONY: help setup demo test test-fast lint format docs table composition lock clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# \(make.*\)/\1/p' Makefile

setup: .venv/.ready

.venv/.ready: pyproject.toml setup.py constraints.txt scripts/setup.sh data/decoding/native/decode.cpp
	@scripts/setup.sh
	@touch $@

demo: setup
	@$(PY) run.py -f yamls/digits_medium.yaml --compare $(ARGS)

# Three at a time on two cores: a test runs on one thread (tests/conftest.py), and ranks wait for each other.
PYTEST := $(PY) -m pytest --numprocesses 3 --dist loadgroup

test: setup
	@$(PYTEST) $(ARGS)

test-fast: setup
	@$(PYTEST) -m "not slow" $(ARGS)

lint: setup
	@.venv/bin/ruff check . && .venv/bin/ruff format --check . && .venv/bin/pyright

format: setup
	@.venv/bin/ruff check --fix . ; .venv/bin/ruff format .

# docs/composition.md: what composes with what, ours and Composer's (several minutes).
composition: setup
	@$(PY) scripts/composition.py

# Pins for every extra and every supported Python; names and versions only.
lock: setup
	@.venv/bin/uv pip compile pyproject.toml --all-extras --universal --python-version 3.10 \
		--no-header --no-annotate --quiet --upgrade -o constraints.txt

docs: setup
	@.venv/bin/uv pip install --quiet --python $(PY) --constraint constraints.txt "mkdocs-material"
	@.venv/bin/mkdocs build --quiet && echo "site/index.html"

# The README's table of algorithms, from the registry.
table: setup
	@$(PY) scripts/table.py

clean:
	rm -rf .venv .cache build dist *.egg-info
