# Everything a user needs on a fresh machine with Python >= 3.11: `make train`, `make test`.
# The environment lives in the clone; nothing is cached outside of it.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: train test quick check clean

train: $(VENV)/run.stamp
	$(BIN)/python -m launch.train --config=configs/laptop.py --virtual_devices=8 --workdir=runs/laptop $(ARGS)

# All tests, on two workers; `make quick` leaves out the slow ones.
test: $(VENV)/test.stamp check
	$(BIN)/python -m pytest -n 2 $(ARGS)

quick: $(VENV)/test.stamp
	$(BIN)/python -m pytest -n 2 -m "not slow" $(ARGS)

check: $(VENV)/test.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-cache

clean:
	rm -rf $(VENV) runs build *.egg-info

$(VENV)/bin/python:
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python >= 3.11 needed, found ' + sys.version.split()[0] + '; name one with: make PYTHON=python3.12 ...')"
	$(PYTHON) -m venv $(VENV)

$(VENV)/run.stamp: setup.cfg pyproject.toml | $(VENV)/bin/python
	$(PIP) --editable .
	touch $@

# torch first and pinned, so that no other package draws in a build with gigabytes of CUDA.
$(VENV)/test.stamp: setup.cfg pyproject.toml | $(VENV)/bin/python
	$(PIP) "torch == 2.13.0"
	$(PIP) --editable ".[test]"
	touch $@ $(VENV)/run.stamp
