PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: help demo evidence test test-slow lint types docs wheel clean

help:
	@echo "make demo       train and compare a baseline and a multigrid run, two seeds each (9 minutes on two cores, set-up included)"
	@echo "make test       run the tests (6 to 7 minutes on two cores)"
	@echo "make test-slow  run the slow tests"
	@echo "make lint       check style and formatting"
	@echo "make types      check types"
	@echo "make docs       build the documentation site in site/"
	@echo "make wheel      build a wheel in dist/"
	@echo "make evidence   update the README and docs/explanation/evidence.md from the results in studies/"

$(VENV)/installed: setup.cfg pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("mgtrain needs Python 3.10 or newer" if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

demo: $(VENV)/installed
	$(BIN)/mgtrain data synthesize data/motions
	$(BIN)/mgtrain study studies/demo.yaml --seeds 2 --jobs $$(($$(nproc) > 1 ? 2 : 1)) --results runs/demo/results
	@echo "open runs/demo/results/index.html"

evidence: $(VENV)/installed
	$(BIN)/python scripts/evidence.py

test: $(VENV)/installed
	$(BIN)/pytest --numprocesses 2 --dist worksteal

test-slow: $(VENV)/installed
	$(BIN)/pytest -m slow

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed
	$(BIN)/mypy

$(VENV)/installed-docs: $(VENV)/installed
	$(BIN)/pip install --quiet --editable '.[docs]'
	touch $@

docs: $(VENV)/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "open site/index.html; its search needs a server: $(BIN)/mkdocs serve"

wheel: $(VENV)/installed
	rm -rf build dist
	$(BIN)/python -m build --wheel --outdir dist .

clean:
	rm -rf build dist site .venv *.egg-info .pytest_cache .mypy_cache .ruff_cache
