# make quickstart, make test: each makes the environment in .venv if it is not there yet, and installs what is missing.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
.DEFAULT_GOAL := help
.PHONY: help quickstart test test-all test-timm torture matrix lint docs clean

# What `make test-timm` adds: -k EXPRESSION, or --sample for one model of each family
TIMM_TESTS ?=
# What `make matrix` adds: --only oldest, or tests
MATRIX ?=

help:
	@echo 'make quickstart   train a small network on real images, one to three minutes on a CPU'
	@echo 'make test         run the tests, five minutes on two quiet cores'
	@echo 'make test-all     run also the long ones: compilers, other libraries, several processes, the notebook'
	@echo 'make test-timm    run the model tests of timm itself on the models of this package'
	@echo 'make torture      kill runs, fill disks, damage files: the long tests, an hour on a CPU'
	@echo 'make matrix       run the tests with every supported Python, and with the oldest supported libraries'
	@echo 'make lint         check the style'
	@echo 'make docs         build the documentation site into build/site'
	@echo 'make clean        remove the environment and all outputs'

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# One stamp for each set of extras: a second call installs nothing
$(VENV)/.installed-%: setup.cfg pyproject.toml | $(BIN)/python
	@echo 'Installing timm_rla[$*] into $(VENV): PyTorch and all, some 5 GB at the first time'
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[$*]'
	@touch $@

quickstart: $(VENV)/.installed-quickstart
	$(BIN)/timm-rla quickstart

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n 2 tests

test-all: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n 2 --long tests

torture: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python tests/reliability/torture.py

matrix:
	$(PYTHON) tests/matrix.py $(MATRIX)

test-timm: $(VENV)/.installed-test
	$(BIN)/python tests/run_timm_suite.py -q $(TIMM_TESTS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .

docs: $(VENV)/.installed-docs
	$(BIN)/python -m sphinx -W --keep-going -b html docs build/site

clean:
	rm -rf $(VENV) build output *.egg-info
