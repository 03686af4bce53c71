# Everything a user needs on a fresh machine with Python >= 3.11: `make train`, `make test`.
# The environment lives in the clone; nothing is cached outside of it.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: train serve test quick check rehearse plan clean

train: $(VENV)/run.stamp
	$(BIN)/python -m launch.train --config=configs/laptop.py --virtual_devices=8 --workdir=runs/laptop $(ARGS)

# Answers OpenAI's clients with what `make train` made.
serve: $(VENV)/serve.stamp
	$(BIN)/python -m launch.serve --workdir=runs/laptop $(ARGS)

# All tests, on two workers; `make quick` leaves out the slow ones.
test: $(VENV)/test.stamp check
	$(BIN)/python -m pytest -n 2 $(ARGS)

quick: $(VENV)/test.stamp
	$(BIN)/python -m pytest -n 2 -m "not slow" $(ARGS)

# Compiles pod64's train step for 16 hosts x 4 H100, which need not be there, and reads it back.
rehearse: $(VENV)/rehearse.stamp
	$(BIN)/python -m launch.rehearse --config=configs/pod64.py --pod=h100:16x4 --step=train --json=runs/rehearse/report.json --picture=runs/rehearse/tick.html $(ARGS)

# Every figure of the reference plan recomputed, and the best plan for the same 64 GPUs.
plan: $(VENV)/run.stamp
	$(BIN)/python -m launch.plan --config=configs/pod64.py --json=runs/plan/plan.json --out=runs/plan $(ARGS)

check: $(VENV)/test.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-cache

clean:
	rm -rf $(VENV) runs build *.egg-info

$(VENV)/bin/python:
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python >= 3.11 needed, found ' + sys.version.split()[0] + '; name one with: make PYTHON=python3.12 ...')"
	$(PYTHON) -m venv --clear $(VENV) || { rm -rf $(VENV); exit 1; }

# Newer than every stamp where the environment is, whose Python may have gone meanwhile.
$(VENV)/pyvenv.cfg: $(VENV)/bin/python
	touch $@

$(VENV)/run.stamp: setup.cfg pyproject.toml $(VENV)/pyvenv.cfg
	$(PIP) --editable .
	touch $@

# torch first and pinned, so that no other package draws in a build with gigabytes of CUDA.
$(VENV)/test.stamp: setup.cfg pyproject.toml $(VENV)/pyvenv.cfg
	$(PIP) "torch == 2.13.0"
	$(PIP) --editable ".[test,rehearse,serve]"
	touch $@ $(VENV)/run.stamp $(VENV)/rehearse.stamp $(VENV)/serve.stamp

$(VENV)/serve.stamp: setup.cfg pyproject.toml $(VENV)/pyvenv.cfg
	$(PIP) --editable ".[serve]"
	touch $@ $(VENV)/run.stamp

$(VENV)/rehearse.stamp: setup.cfg pyproject.toml $(VENV)/pyvenv.cfg
	$(PIP) --editable ".[rehearse]"
	touch $@ $(VENV)/run.stamp
