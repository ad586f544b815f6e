PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check proto setup

demo: setup
	$(BIN)/penstock demo

test: .venv/.test
	scripts/test

check: .venv/.dev
	scripts/check

proto:
	PYTHON=$(PYTHON) scripts/proto

setup: .venv/.setup

.venv/.%: pyproject.toml client/pyproject.toml constraints.txt
	PYTHON=$(PYTHON) scripts/setup $*
