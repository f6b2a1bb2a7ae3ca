# Everything a newcomer runs. Needs git, make and Python 3.10 or newer (the pins are for 3.11).
# `make demo` and `make test` install first; the install is done once, until what it depends on changes.

PYTHON ?= $(shell for python in python3.11 python3; do \
	"$$python" -c '' 2>/dev/null && echo "$$python" && break; done)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SOURCES := nni_plugin adapters benchmarks tests docs/hooks
FARM := build/types

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help install demo test lint types format bench docs clean

help:  ## Show this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /make \1	/' | expand -t 16

install: $(STAMP)  ## Create .venv and install the package with every extra, at the pinned versions

# No build isolation: the build too uses the setuptools that constraints.txt pins.
$(STAMP): setup.cfg pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt setuptools wheel
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		--no-build-isolation --editable '.[train,compare,export,plots,nni,docs,dev]'
	touch $@

demo: install  ## Train ResNet-20 on digits, prune it to half its MACs, write out/demo/report.html
	$(BIN)/nni-plugin prune --library nni_plugin --model resnet20 --dataset digits \
		--method taylor-fo --macs 0.5 --schedule iterative --batch-size 64 \
		--pretrain-epochs 10 --epochs 10 --output out/demo

# One thread a worker: two workers with two threads each would fight over two cores.
test: install lint types  ## Lint, types, doctests and tests
	OMP_NUM_THREADS=1 HYPOTHESIS_PROFILE=ci $(BIN)/python -m pytest -q -n 2 --dist loadgroup

lint: install  ## Check style and form
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

# mypy finds packages by their folders alone, so it is given the folders as they will be installed.
types: install  ## Check types
	@mkdir -p $(FARM)/nni_plugin
	@find $(FARM) -xtype l -delete
	@cd $(FARM)/nni_plugin && ln -sfn ../../../nni_plugin/* ../../../adapters ../../../benchmarks .
	cd $(FARM) && ../../$(BIN)/python -m mypy --config-file ../../pyproject.toml \
		--cache-dir ../../.mypy_cache -p nni_plugin

format: install  ## Put the sources into the house's form
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

bench: install  ## Measure what scoring and pruning cost beside plain training
	$(BIN)/python -m nni_plugin.benchmarks

docs: install  ## Build the documentation into build/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

clean:  ## Remove what was built, keep .venv
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +
