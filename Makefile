# Targets: demo, test, lint, format, bench, soak, clean. CI runs `make lint` and `make test`, the same as you.
# Needs make, python3 and python3-venv (Debian/Ubuntu: apt-get install make python3-venv). The rest goes into .venv.
#
#   make demo ARGS="--port 8060"     options are passed to `layerwatch demo`
#   make test ARGS="tests/monitor"   options are passed to pytest; test files run beside each other, one a core
#   LAYERWATCH_CHROMIUM=/path/to/chrome make test

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test lint format bench soak clean browser

help:
	@sed -n '1,7s/^# \{0,1\}//p' Makefile

# One stamp for each set of packages: nothing is installed again until these two files change.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "layerwatch needs Python 3.10 or newer, $(PYTHON) is older: try make PYTHON=python3.12" >&2; exit 2; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "python could not make a virtual environment: on Debian/Ubuntu, apt-get install python3-venv" >&2; exit 2; }

$(VENV)/.installed-demo: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing layerwatch and its demo into $(VENV) (a few minutes, once)"
	$(INSTALL) -e '.[demo]'
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing layerwatch and its development tools into $(VENV) (a few minutes, once)"
	$(INSTALL) -e '.[demo,dev]'
	@touch $@ $(VENV)/.installed-demo

$(VENV)/.installed-bench: $(VENV)/.installed-dev
	@echo "Installing what the benchmarks compare with into $(VENV)"
	$(INSTALL) -e '.[bench]'
	@touch $@

# The browser tests drive a real Chromium.
browser:
	@sh .ci/browser

demo: $(VENV)/.installed-demo
	$(BIN)/layerwatch demo $(ARGS)

test: $(VENV)/.installed-dev browser
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(VENV)/.installed-bench
	@for script in benchmarks/[a-z]*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

soak: $(VENV)/.installed-dev browser
	$(BIN)/python -m pytest -m soak --timeout 3600 $(ARGS)

clean:
	rm -rf $(VENV) build dist test-output *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
