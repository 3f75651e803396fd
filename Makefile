# Two commands do everything on a fresh machine with Python 3.11+: `make demo` and `make test`.
# `make check` is the quick part of the tests; `make test-oldest` runs the core's on the oldest versions supported.
# `make docs/measured/demo.png` draws README's picture again.
PYTHON ?= python3
BIN := .venv/bin
# Most tests use one core; who is done takes over from the other.
WORKERS := -n 2 --dist worksteal

.PHONY: demo test check test-oldest lint clean

demo: .venv/bench
	$(BIN)/python benchmarks/run.py --model resnet34 --out runs/demo --overwrite

docs/measured/demo.png: demo
	cp runs/demo/figure.png $@

test: .venv/test lint
	$(BIN)/python -m pytest $(WORKERS)

check: .venv/test lint
	$(BIN)/python -m pytest -q $(WORKERS) -m "not slow"

test-oldest: .venv-oldest/test
	.venv-oldest/bin/python -m pytest $(WORKERS) tests/oscopt tests/kernels

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@# mypy knows no package_dir: a folder of links shows it oscopt.kernels where that is installed.
	mkdir -p .venv/types/oscopt
	ln -sfn $(CURDIR)/oscopt/*.py $(CURDIR)/oscopt/py.typed $(CURDIR)/kernels .venv/types/oscopt/
	cd .venv/types && ../bin/mypy --config-file ../../pyproject.toml

clean:
	rm -rf .venv .venv-oldest build dist *.egg-info

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

.venv-oldest/test: setup.py pyproject.toml tests/oldest.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install -q -c tests/oldest.txt -e '.[test]'
	touch $@
