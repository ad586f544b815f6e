PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test chaos check proto setup

demo: setup
	$(BIN)/penstock demo

test: .venv/.test
	scripts/test

chaos: .venv/.test
	scripts/test -m chaos -s tests/e2e/test_chaos.py

check: .venv/.dev
	scripts/check

proto:
	PYTHON=$(PYTHON) scripts/proto

setup: .venv/.setup

.venv/.%: pyproject.toml client/pyproject.toml constraints.txt
	PYTHON=$(PYTHON) scripts/setup $*
