PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: help demo test test-slow lint types wheel clean

help:
	@echo "make demo       train a baseline and a multigrid run on synthetic videos, and compare them"
	@echo "make test       run the tests (7 minutes on two cores)"
	@echo "make test-slow  run the slow tests"
	@echo "make lint types wheel"

$(VENV)/installed: setup.cfg pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("mgtrain needs Python 3.10 or newer" if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

demo: $(VENV)/installed
	$(BIN)/mgtrain data synthesize data/motions
	$(BIN)/mgtrain fit demo_baseline --resume
	$(BIN)/mgtrain fit demo_multigrid --resume --baseline demo_baseline
	$(BIN)/mgtrain compare demo_baseline demo_multigrid

test: $(VENV)/installed
	$(BIN)/pytest --numprocesses 2 --dist worksteal

test-slow: $(VENV)/installed
	$(BIN)/pytest -m slow

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed
	$(BIN)/mypy

wheel: $(VENV)/installed
	rm -rf build dist
	$(BIN)/python -m build --wheel --outdir dist .

clean:
	rm -rf build dist .venv *.egg-info .pytest_cache .mypy_cache .ruff_cache
