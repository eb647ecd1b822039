# Each target makes .venv first, from nothing but python3 and make; what is there already is not made again.
PYTHON ?= python3
BIN = .venv/bin
INSTALL = $(BIN)/python -m pip install --quiet -c constraints.txt

.PHONY: demo app test lint
demo: .venv/installed
	$(BIN)/sdlora demo
	$(BIN)/python -m tools.toybox.judge demo outputs/demo/style/style.safetensors outputs/demo/character/character.safetensors

app: .venv/installed
	$(BIN)/sdlora app

test: .venv/installed-dev
	$(BIN)/python -m pytest

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/mypy

.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(INSTALL) -e .
	touch $@

.venv/installed-dev: .venv/installed
	$(INSTALL) -e '.[dev]'
	touch $@
