# SPDX-License-Identifier: Apache-2.0
PYTHON := .venv/bin/python

.PHONY: quickstart test test-lowest coverage lint docs clean

.venv: pyproject.toml constraints.txt
	python3 -m venv .venv
	.venv/bin/pip install -c constraints.txt -e ".[dev]"
	touch .venv

quickstart: .venv
	$(PYTHON) -m anomalib_recon.quickstart

test: .venv
	$(PYTHON) -m pytest -n 2 --dist loadfile

# with the lowest versions that pyproject.toml allows
test-lowest:
	python3 -m venv .venv-lowest
	.venv-lowest/bin/pip install uv
	.venv-lowest/bin/uv pip install --python .venv-lowest/bin/python --resolution lowest-direct -e ".[dev]"
	.venv-lowest/bin/python -m pytest -n 2 --dist loadfile

# which lines the tests run: a table, and pages in htmlcov
coverage: .venv
	$(PYTHON) -m pytest -n 2 --dist loadfile --cov --cov-report term --cov-report html

lint: .venv
	$(PYTHON) -m ruff check
	$(PYTHON) -m ruff format --check
	$(PYTHON) -m mypy

docs: .venv
	$(PYTHON) -m mkdocs build --strict

clean:
	rm -rf .venv .venv-lowest build dist htmlcov site .coverage* .mypy_cache .pytest_cache .ruff_cache
