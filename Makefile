# The doors of the project. Each target sets up what it needs in the checkout; a second run adds no wait.
#
#   make up [ARGS="--detach --source auto|live|sim|none --data-dir DIR"]     start everything (Ctrl-C or `make down` ends it)
#   make test [ARGS="tests/schemas -k codec"]                                every gate and test
#   make prove [ARGS="gaps matrix --short"]                                  every promise, shown: hours
#   make bench [ARGS="bars --json"]                                          figures beside those of other programs

SHELL := /bin/sh
# python3 may be too old or missing while a newer one is there: bootstrap.py says what is wrong or finds it
PYTHON ?= $(shell for name in .venv/bin/python python3 python3.13 python3.12 python3.11; do command -v $$name && break; done)
BOOTSTRAP = $(if $(PYTHON),$(PYTHON) -I -S infra/bootstrap.py,$(error Marketstream needs Python 3.11 to 3.13 and this machine has no python3; install it and run make again))
VENV := .venv/bin
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup up down test prove bench lint format lock clean

help: ## this list
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/^([a-z]+):.*## (.*)/  make \1\t\2/' | expand -t 16

setup: ## install everything the stack needs into the checkout
	@$(BOOTSTRAP) run

up: setup ## start Kafka, PostgreSQL, ClickHouse and the pipeline, and show a live table
	@exec $(VENV)/marketstream up $(ARGS)

down: setup ## stop what `make up` started
	@exec $(VENV)/marketstream down $(ARGS)

test: ## ruff, mypy, import directions, then unit, property and integration tests on the real stack
	@$(BOOTSTRAP) dev
	@exec $(VENV)/python -m infra.cli.gates test $(ARGS)

prove: ## run every line of the proof (hours; ARGS="--short": minutes) and keep a page with the figures
	@$(BOOTSTRAP) dev
	@exec $(VENV)/marketstream prove $(ARGS)

lint: ## ruff and mypy alone
	@$(BOOTSTRAP) dev
	@exec $(VENV)/python -m infra.cli.gates lint

format: ## let ruff format the code and sort its imports
	@$(BOOTSTRAP) dev
	@$(VENV)/ruff check --fix --select I . && $(VENV)/ruff format .

bench: setup ## measure ourselves and others in the same interleaved run
	@$(BOOTSTRAP) bench
	@exec $(VENV)/marketstream bench $(ARGS)

lock: ## resolve the dependencies of pyproject.toml anew into requirements/
	@$(BOOTSTRAP) dev
	@exec $(VENV)/python -m infra.cli.lock

clean: ## remove what was installed and built, not the data in .data
	@rm -rf .venv .venv-bench .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis build *.egg-info
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
