# make demo: the main job on the embedded pipeline. make test: everything CI checks.
# make docs: the documentation, in site/; open site/index.html.
# make dist: wheel and source archive, checked. make test-wheel: the wheel in an empty environment.
# make test-minimum: all tests with the oldest versions that are admitted.
PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
# Matrices this small gain nothing from a second thread, and on a busy machine lose tenfold by it.
export OMP_NUM_THREADS := 1
# It is about the tool's successor, not about these pages.
export NO_MKDOCS_2_WARNING := 1

.PHONY: demo test check docs docs-serve dist test-wheel test-minimum clean

.venv/ready: pyproject.toml setup.cfg constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -c constraints.txt -e '.[dev,docs]'
	touch $@

demo: .venv/ready
	$(BIN)/python scripts/demo.py

check: .venv/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Two files at a time: most tests use one core.
test: check
	$(BIN)/pytest -n 2 --dist loadfile

docs: .venv/ready
	$(BIN)/mkdocs build --strict

docs-serve: .venv/ready
	$(BIN)/mkdocs serve

dist: .venv/ready
	$(BIN)/pip install -q -c constraints.txt build twine
	rm -rf build dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

test-wheel: dist
	$(PYTHON) -m venv --clear .venv-wheel
	.venv-wheel/bin/pip install -c constraints.txt dist/*.whl
	scripts/test_wheel.sh .venv-wheel

.venv-minimum/ready: pyproject.toml constraints-minimum.txt
	$(PYTHON) -m venv --clear .venv-minimum
	.venv-minimum/bin/pip install -c constraints-minimum.txt -e '.[dev,docs]'
	touch $@

test-minimum: .venv-minimum/ready
	.venv-minimum/bin/pytest

clean:
	rm -rf .venv .venv-* dist runs build site *.egg-info
