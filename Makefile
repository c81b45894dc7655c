# Two commands set everything up: `make demo` and `make test`.
# A local folder of wheels that pip knows (PIP_FIND_LINKS) is shown to uv as well: with the exact torch pin in
# constraints.txt a CPU file there is taken; elsewhere the package index decides.
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test check format clean help

help:
	@echo "make demo    create the environment, prepare the embedded model, run the main job on it"
	@echo "make test    run the tests (all but those that need a GPU)"
	@echo "make check   formatter, linter, types, import contracts"
	@echo "make format  format and fix what can be fixed"

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt -e '.[dev]'
	@touch $(READY)

demo: $(READY)
	$(BIN)/cage relabel -c configs/quickstart.yaml

test: $(READY)
	$(BIN)/python -m pytest

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
