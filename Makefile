# make demo: the main job on the embedded pipeline. make test: everything CI checks.
PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
# Matrices this small gain nothing from a second thread, and on a busy machine lose tenfold by it.
export OMP_NUM_THREADS := 1

.PHONY: demo test check clean

.venv/ready: pyproject.toml setup.cfg constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -c constraints.txt -e '.[dev]'
	touch $@

demo: .venv/ready
	$(BIN)/python scripts/demo.py

check: .venv/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test: check
	$(BIN)/pytest

clean:
	rm -rf .venv runs build *.egg-info
