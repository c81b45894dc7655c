# Two commands set everything up: `make demo` and `make test`.
# A local folder of wheels that pip knows (PIP_FIND_LINKS) is shown to uv as well: with the exact torch pin in
# constraints.txt a CPU file there is taken; elsewhere the package index decides.
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Byte code is written, whatever the caller's shell says: without it every start of a command, a test's subprocess or
# a Ray worker compiles thousands of modules anew.
unexport PYTHONDONTWRITEBYTECODE
READY := $(VENV)/.ready

.PHONY: demo test nightly simulate chaos check docs format browser kernels evidence audit lock soak clean help

help:
	@echo "make demo    create the environment, prepare the embedded model, run the main job on it"
	@echo "make test    run the tests, but for those that need a GPU and the long ones"
	@echo "make nightly run the long tests: clusters, images, kills over Ray, every family's game (about 40 minutes)"
	@echo "make simulate  10,000 simulated runs with faults, in two processes: some minutes"
	@echo "make chaos   50 real runs that are killed and resumed"
	@echo "make check   formatter, linter, types, import contracts, documentation"
	@echo "make docs    build the documentation into site/"
	@echo "make format  format and fix what can be fixed"
	@echo "make audit   check the lock of all dependencies, and look for known vulnerabilities"
	@echo "make lock    make requirements.lock anew after a change of constraints.txt or pyproject.toml"
	@echo "make soak    a run over Ray for an hour, killed every minute; its memory is recorded"
	@echo "make kernels install Triton (a gigabyte), whose interpreter runs the GPU's kernel on a CPU; for its tests"
	@echo "make evidence measure docs/evidence.md again, stage by stage; SCALE=small, medium, trained, second, other and gpu are parts of it"
	@echo "make browser install Chromium where there is none, on Debian as root; for the tests of the report"

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python -c constraints.txt -e '.[dev]'
	@touch $(READY)

demo: $(READY)
	$(BIN)/cage relabel -c configs/quickstart.yaml

test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder

simulate: $(READY)
	$(BIN)/python -m tests.simulation --schedules 10000 --jobs 2

chaos: $(READY)
	$(BIN)/python tests/chaos.py --schedules 50

check: $(READY) docs
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Strict: a link, a name of the API or a page that is not there is an error. Nothing is fetched.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/python -m jobs.reference > docs/configuration.md

# Without a browser the tests that look at a report are skipped; nothing else needs one.
browser:
	@command -v chromium || command -v chromium-browser || command -v google-chrome || { \
	  [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq && \
	  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >/dev/null && \
	  command -v chromium; } || echo "no browser, and none could be installed: the tests that need one are skipped"

# Without Triton the tests that interpret the kernel are skipped; on a machine with a GPU torch brings it.
kernels: $(READY)
	@$(BIN)/python -c "import triton" 2>/dev/null || \
	  $(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python -c constraints.txt triton || \
	  echo "Triton could not be installed: the tests that interpret the kernel are skipped"

# Stages that are done are skipped, and one that was interrupted goes on. The whole design takes days on a CPU.
evidence: $(READY)
	$(BIN)/python -m jobs.evidence --scale $(or $(SCALE),full)

# What is installed, with hashes, against constraints.txt; known vulnerabilities, where the package index has data.
audit: $(READY)
	$(BIN)/python tests/audit.py

# The lock has the hashes of the index's files, whatever local wheels there are.
lock: $(READY)
	env -u UV_FIND_LINKS -u PIP_FIND_LINKS $(BIN)/uv pip compile --quiet --generate-hashes --no-annotate --no-header \
	  --python-version 3.11 --python-platform linux -c constraints.txt pyproject.toml -o requirements.lock \
	  --extra lora --extra embedded --extra evaluate --extra synthesize --extra gcs --extra cluster --extra train

# What takes half a minute or more each: most of it are processes that start.
nightly: $(READY)
	$(BIN)/python -m pytest -m nightly -n 2 --dist loadscope --no-loadscope-reorder

# An hour of kills over Ray with memory recorded; SOAK=--minutes=5 for less.
soak: $(READY)
	$(BIN)/python tests/soak.py $(SOAK)

clean:
	rm -rf $(VENV) build dist site *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
