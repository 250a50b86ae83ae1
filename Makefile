# Everything a person needs: `make lab` to read and explore, `make test` to check.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
JOBS   ?= auto

.PHONY: help lab test lint bench site status pins clean

help:  ## list the targets
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 10

$(VENV)/.lab: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[lab,loss-landscapes,losses,scaling-laws]'
	@touch $@

$(VENV)/.test: $(VENV)/.lab
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[lab,loss-landscapes,losses,scaling-laws,test]'
	@touch $@

lab: $(VENV)/.lab  ## open JupyterLab on the index notebook
	$(BIN)/workbench lab

test: $(VENV)/.test  ## run every test, notebooks included
	$(BIN)/python -m pytest -n $(JOBS) --dist loadgroup

lint: $(VENV)/.test  ## formatting, style, types, floors
	$(BIN)/ruff format --check workbench tests
	$(BIN)/ruff check workbench tests
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.test  ## measure speed against the peers and print the table
	$(BIN)/python -m pytest tests/benchmarks -m bench -q -p no:xdist

site: $(VENV)/.lab  ## build the static site into site/
	$(BIN)/workbench site

status: $(VENV)/.lab  ## derive catalogue and status tables from what exists
	$(BIN)/workbench papers --update

pins: $(VENV)/.test  ## write constraints.txt from the present environment
	$(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu$$//' > constraints.txt.new
	mv constraints.txt.new constraints.txt

clean:  ## remove what can be made again, but never runs/ or the environment
	rm -rf site build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
