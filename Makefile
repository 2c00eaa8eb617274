# make help       what there is
# Variables of the set-up (EXTRA, PYTHON, TORCH_ARGS, PIP_ARGS, RESOLVE): see requirements/setup.sh
export EXTRA PYTHON TORCH_ARGS PIP_ARGS RESOLVE

PYTHON_VENV := .venv/bin/python
CONFIG ?= configs/quickstart.yaml
SOURCES := medtvt_rl actors pipelines tests requirements

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test test-hosts lint format lock

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20
	@echo '  Without a GPU and with the default package index: make setup TORCH_ARGS="--index-url ADDRESS-OF-CPU-BUILDS"'

setup: ## create .venv with everything pinned; at once when nothing changed
	@bash requirements/setup.sh

quickstart: setup ## simulated cohort, PT, SFT, GRPO, evaluation and report on this machine; OVERRIDES="key=value ..."
	@.venv/bin/medtvt-rl run -c $(CONFIG) $(OVERRIDES)

test: setup ## every test; TESTS="tests/data -k ecg" for some
	@$(PYTHON_VENV) -m pytest $(TESTS)

test-hosts: setup ## a cluster of four hosts in namespaces of this machine: ray up, a job, ray down; needs root
	@$(PYTHON_VENV) -m pytest -m hosts -rs -s tests/integration/three_hosts

lint: setup ## ruff (rules and format) and mypy
	@$(PYTHON_VENV) -m ruff check $(SOURCES)
	@$(PYTHON_VENV) -m ruff format --check $(SOURCES)
	@$(PYTHON_VENV) -m mypy

format: setup ## let ruff mend what it can
	@$(PYTHON_VENV) -m ruff check --fix $(SOURCES)
	@$(PYTHON_VENV) -m ruff format $(SOURCES)

lock: ## write what .venv holds to the lock file of this platform (after make setup RESOLVE=1)
	@$(PYTHON_VENV) requirements/lock.py write requirements/$(or $(EXTRA),cpu)-$$(uname -s | tr A-Z a-z)-$$(uname -m).txt
