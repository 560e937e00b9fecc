# make demo        the main job on this machine; writes out/demo/
# make test        the tests
# make test-oldest the tests with the oldest jax we support
# make compile-report  compile the GPU kernels without a GPU and say what they became (installs 1.4 GB)
# make compile-test    the tests that need that compiler
# make lint        ruff and pyright
# make notebooks   run notebooks/*.py and write the .ipynb beside each
# make train       train the demo's model again (long on a CPU)
# make clean       remove out/ and caches;  make clean-all  also removes the environments
#
# Each target sets .venv up when it is missing and does nothing to it when pyproject.toml, constraints.txt and this
# folder's place are unchanged, so a second run starts at once and needs no network.
# PYTHON=/path/to/python3.12 names the interpreter to build .venv with. ARGS="--prompts 8" goes to the demo or pytest.

SHELL := /bin/bash
PYTHON ?=
WORKERS ?= 2
ARGS ?=
OLDEST := 0.11.2

VENV := .venv
PY := $(VENV)/bin/python
# The name of a stamp says what was installed: another pyproject.toml, another place, another stamp.
KEY := $(shell (pwd; cat pyproject.toml constraints.txt) | cksum | cut -d ' ' -f 1)
CORE := $(VENV)/.core-$(KEY)
DEV := $(VENV)/.dev-$(KEY)
COMPILE := .venv-cuda/.compile-$(KEY)
DEV_OLDEST := .venv-oldest/.dev-$(KEY)

.PHONY: help demo test test-oldest compile-report compile-test lint notebooks train clean clean-all
.DELETE_ON_ERROR:

help:
	@sed -n '/^# make/s/^# //p' Makefile

demo: $(CORE)
	@$(PY) -m paro_jax demo --out out/demo $(ARGS)

test: $(DEV)
	@$(PY) -m pytest -n $(WORKERS) $(ARGS)

test-oldest: $(DEV_OLDEST)
	@.venv-oldest/bin/python -m pytest -n $(WORKERS) $(ARGS)

compile-report: $(COMPILE)
	@JAX_PLATFORMS=cpu .venv-cuda/bin/python -m paro_jax compile-report $(ARGS)

compile-test: $(COMPILE)
	@JAX_PLATFORMS=cpu .venv-cuda/bin/python -m pytest -n $(WORKERS) tests/test_hopper.py tests/test_arrange_hopper.py \
		tests/test_ampere.py -k "compiles or keeps_its_bound" $(ARGS)

lint: $(DEV)
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m pyright

notebooks: $(DEV)
	@$(PY) tools/write_notebooks.py

# Training allocates and frees large buffers all the time: without these, half the time goes to page faults (glibc).
train: export MALLOC_MMAP_MAX_ = 0
train: export MALLOC_TRIM_THRESHOLD_ = 1000000000000
train: export MALLOC_TOP_PAD_ = 268435456
train: export GLIBC_TUNABLES = glibc.malloc.hugetlb=1
train: $(CORE)
	@$(PY) -m paro_jax.demo.train $(ARGS)

clean:
	@rm -rf out dist build .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +

clean-all: clean
	@rm -rf .venv .venv-cuda .venv-oldest

# $(call python,VENV): the interpreter for VENV; one line and no more when there is none.
python = $(if $(filter error:,$(firstword $(found))),$(error $(wordlist 2,999,$(found))),$(found))
found = $(shell bash tools/find-python $(1) "$(PYTHON)")

$(CORE):
	@bash tools/install $(VENV) "$(call python,$(VENV))" constraints.txt -e .
	@rm -f $(VENV)/.core-* && touch $@

$(DEV):
	@bash tools/install $(VENV) "$(call python,$(VENV))" constraints.txt -e '.[dev]'
	@rm -f $(VENV)/.core-* $(VENV)/.dev-* && touch $(CORE) $@

$(COMPILE):
	@bash tools/install .venv-cuda "$(call python,.venv-cuda)" constraints.txt -e '.[dev,compile]'
	@rm -f .venv-cuda/.compile-* && touch $@

$(DEV_OLDEST):
	@mkdir -p out
	@sed -E 's/^(jax|jaxlib)==.*/\1==$(OLDEST)/' constraints.txt > out/constraints-oldest.txt
	@bash tools/install .venv-oldest "$(call python,.venv-oldest)" out/constraints-oldest.txt -e '.[dev]'
	@rm -f .venv-oldest/.dev-* && touch $@
