PYTHON ?= python

.PHONY: install build test lint bench gate clean

install:
	$(PYTHON) -m pip install -e .

build:  # recompile the native library in place, without an isolated environment
	$(PYTHON) setup.py -q build_ext --inplace

test:
	$(PYTHON) -m pytest -q -n 2 --dist loadfile

lint:
	$(PYTHON) -m ruff check . && $(PYTHON) -m ruff format --check . && $(PYTHON) -m mypy

bench:
	$(PYTHON) bench/run.py

gate: lint test

clean:
	rm -rf build dist *.egg-info vqfast/_C*.so .pytest_cache .ruff_cache .mypy_cache
