# `make run`: set up and run the whole beam-management chain. `make test`: set up and check everything. `make ui`: look at it.
# `make demo-drift`: the field shifts, the champion is re-distilled and promoted, unattended; in a home of its own.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

FUNCTION ?= beam_management
SCALE ?= laptop
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	command -v $$p >/dev/null && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' && echo $$p && break; done)
BIN := .venv/bin
STAMP := .venv/.installed
export DAGSTER_DISABLE_TELEMETRY := yes
export MLFLOW_DISABLE_TELEMETRY := true
export DO_NOT_TRACK := true

.PHONY: help run test ui demo-drift lint clean postgres

help:
	@grep '^# `make' Makefile | cut -c3-

run: $(STAMP)
	@$(BIN)/rankd run $(FUNCTION) --scale $(SCALE)

test: lint postgres
	$(BIN)/python -m pytest -n 2 --dist loadgroup --durations 15

ui: $(STAMP)
	@$(BIN)/rankd ui

demo-drift: $(STAMP)
	@RANKD_HOME=$${RANKD_HOME:-data/demo-drift} $(BIN)/python -m benchmarks.demo_drift

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

# One install at a time; the second `make` finds the stamp and makes no network call.
$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "rankd needs Python 3.11 or later; none found (set PYTHON=/path/to/python3)."; exit 2; }
	@mkdir -p .venv; exec 9>.venv/.lock; \
	if command -v flock >/dev/null && ! flock -n 9; then echo "another make installs into .venv: waiting for it"; flock 9; fi; \
	if [ -e $(STAMP) ] && [ ! pyproject.toml -nt $(STAMP) ] && [ ! constraints.txt -nt $(STAMP) ]; then exit 0; fi; \
	[ -x $(BIN)/python ] || $(PYTHON) -m venv .venv; \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0 setuptools; \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[dev]'; \
	touch $(STAMP)

# The Postgres test runs against Debian's package; without it (and without root to install it) that test is left out, and says so.
postgres:
	@if ! ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 && ! command -v initdb >/dev/null \
		&& command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
		(apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq postgresql) >/dev/null 2>&1 || true; fi

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find rankd_pipeline rankd_pipeline_tests -name __pycache__ -type d -prune -exec rm -rf {} +
