# Two commands do everything on a fresh machine with Python 3.11+: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint clean

demo: .venv/bench
	$(BIN)/python benchmarks/run.py --model resnet34 --out runs/demo --overwrite

test: .venv/test lint
	$(BIN)/python -m pytest

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf .venv build dist *.egg-info

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit("oscopt needs Python 3.11 or later" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv

# What is installed is marked by a file, so that repeating a command costs nothing.
.venv/bench: setup.py pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -q -e '.[cpu,bench]'
	touch $@

.venv/test: setup.py pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -q -e '.[test]'
	touch $@
