# What is done often; `make` alone lists it. PYTHON makes the environment, VENV is where it stands.
PYTHON ?= python3
VENV ?= .venv
export PATH := $(abspath $(VENV))/bin:$(PATH)

.DEFAULT_GOAL := help
.PHONY: help setup check test quick bench constraints

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' Makefile | expand -t 22

setup: ## an environment in .venv with the tests' tools, at the versions of constraints.txt
	$(PYTHON) -m venv $(VENV)
	python -m pip install -c constraints.txt -e '.[test]'

check: ## linters and types
	ruff check .
	ruff format --check .
	mypy

test: ## the whole suite
	python -m pytest

quick: ## a first trial and its baseline, minutes on a CPU
	python -m distilbench.train experiment=quick freeze.layers=3

bench: ## the engines beside stock Trainer, on this machine
	python -m distilbench.benchmark

constraints: ## write the installed versions into constraints.txt
	@{ sed -n '/^#/p' constraints.txt; \
	   python -m pip freeze --exclude-editable | sed 's/+.*//' | grep -vE '^(nvidia|cuda)-|^triton=='; } > .constraints
	@mv .constraints constraints.txt
