# SPDX-License-Identifier: Apache-2.0
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

# What the caller's shell sets for other projects would leak into .venv.
unexport PYTHONHOME PYTHONPATH PIP_TARGET PIP_PREFIX PIP_USER PIP_REQUIRE_VIRTUALENV
export PIP_NO_INPUT := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PYTHONUNBUFFERED := 1

VENV := .venv
PY := $(VENV)/bin/python
WORKERS := 2

# One stamp per content of the files that say what to install, and per place of the checkout,
# which the editable install names. Touching a file without changing it installs nothing.
STAMP := $(VENV)/.installed-$(shell \
	{ pwd; cat requirements.lock pyproject.toml setup.py; } | cksum | tr -cs '0-9\n' '-')
# Stands in .venv while packages are being written: an interrupted .venv is made anew.
UNFINISHED := $(VENV)/.unfinished

# megatron-core 0.19.2 ships wheels with its compiled dataset helpers for CPython 3.12 and 3.13.
# Each candidate is run, since a pyenv shim may exist for a version that is not selected.
define FIND_PYTHON
for python in $(or $(MAPL_PYTHON),python3.12 python3.13 python3 python \
		"$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/3.1[23]*/bin/python); do \
	if "$$python" -c 'import sys, ensurepip, venv; \
			sys.exit(not ((3, 12) <= sys.version_info[:2] <= (3, 13)))' 2>/dev/null; then \
		echo "$$python"; exit 0; \
	fi; \
done; \
echo "No usable Python found among:" \
	"$(or $(MAPL_PYTHON),python3.12 python3.13 python3 python and what pyenv holds)." \
	"This project needs CPython 3.12 or 3.13 with its venv module (on Debian and Ubuntu the" \
	"package python3.12-venv). To name one: make setup MAPL_PYTHON=/path/to/python3.12" >&2; \
exit 1
endef

.PHONY: help setup lint types test test-older docs demo clean

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */  make \1\t/' | expand -t 18

setup:  ## Make .venv from requirements.lock and install the project; nothing if it is up to date
	@if [[ ! -e $(STAMP) || ! -x $(PY) ]]; then $(MAKE) install; fi

.PHONY: install
install:
	@if [[ -e $(UNFINISHED) || ! -x $(PY) ]]; then rm -rf $(VENV); fi
	@if [[ ! -d $(VENV) ]]; then \
		python="$$($(FIND_PYTHON))"; \
		echo "== making $(VENV) with $$("$$python" --version) ($$python)"; \
		mkdir $(VENV); touch $(UNFINISHED); \
		"$$python" -m venv $(VENV); \
	fi
	@rm -f $(VENV)/.installed-*; touch $(UNFINISHED)
	@echo "== installing requirements.lock (about 3 GB the first time)"
	@$(PY) -m pip install --no-deps -r requirements.lock; rm $(UNFINISHED)
	@echo "== installing the project"
	@$(PY) -m pip install --no-deps --no-build-isolation -e .
	@$(PY) -m pip check
	@touch $(STAMP)

lint: setup  ## ruff
	@echo "== ruff"; $(PY) -m ruff check .

types: setup  ## mypy, strict
	@echo "== mypy"; $(PY) -m mypy

# All three run and report, whichever fails; pytest comes last.
# ARGS goes to pytest: make test ARGS="-k codecs -x". WORKERS processes of pytest share the tests,
# with about 2 GB each; a distributed test's job has up to four processes, which often wait.
test: setup  ## Lint, types, then the unit and distributed tests (CPU)
	@failed=""; \
	$(MAKE) lint || failed+=" lint"; \
	$(MAKE) types || failed+=" types"; \
	echo "== pytest"; \
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --dist worksteal $(ARGS) \
		|| failed+=" pytest"; \
	if [[ -n "$$failed" ]]; then echo "make test failed in:$$failed" >&2; exit 1; fi

# The oldest Megatron that megatron/mapl/versions.py takes, in a folder that stands before .venv's.
OLDER_VERSION := 0.18.2
OLDER := $(VENV)/megatron-core-$(OLDER_VERSION)

test-older: setup  ## Scripts that know nothing of boundaries, on the oldest Megatron
	@if [[ ! -d $(OLDER) ]]; then \
		echo "== installing megatron-core $(OLDER_VERSION) in $(OLDER)"; \
		rm -rf $(OLDER).unfinished; \
		$(PY) -m pip install --quiet --no-deps --target $(OLDER).unfinished \
			megatron-core==$(OLDER_VERSION); \
		mv $(OLDER).unfinished $(OLDER); \
	fi
	@PYTHONPATH=$(abspath $(OLDER)) OMP_NUM_THREADS=1 \
		$(PY) -m pytest -n0 tests/distributed/test_scripts.py $(ARGS)

docs: setup  ## Build the documentation into site/; a broken link or anchor is an error
	@$(PY) -m mkdocs build --strict --quiet
	@echo "== site/index.html"

demo: setup  ## Train a small model on this machine, with and without compression
	@$(PY) tools/demo.py

clean:  ## Remove .venv, caches and build outputs
	rm -rf $(VENV) build dist site *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
