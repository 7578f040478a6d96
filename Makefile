# Every target makes, or reuses, its own environment; all it needs is Python >= 3.11, make and PyPI.
#
#   make demo [TEXT="..."]  what the real Gemma 3 270M and one SAE see in a text: out/inspect.html
#   make quick              the laws and the tests that cost least: for every edit
#   make check              lint, types and quick: before every commit
#   make test               the test suite
#   make test-official      the test suite, and parity with the gemma package (Python >= 3.12, 4 GB)
#   make test-slow          the tests that take minutes each
#   make test-peers         parity with transformers, SAELens, SAEBench and others, in an environment
#                           of their own
#   make bench              the benchmarks against those libraries (not train_quality.py,
#                           attribution_length.py, circuits.py and circuits_clt.py: an hour each;
#                           train_share.py: for GPUs)
#   make lint               ruff and pyright
#   make durations          measure anew which tests `make quick` leaves out (tests/long_tests.txt)
#   make golden             write anew what transformers and circuit-tracer compute (tests/golden)
#   make docs               the documentation as a site: site/index.html
#   make constraints        write anew the tested versions (constraints.txt)
#
# Variables: PYTHON (an interpreter; default the newest of 3.13, 3.12, 3.11 that runs), VENV (the
# environment's folder), JOBS (pytest processes), ARGS (more arguments for pytest).

VENV ?= .venv
PEERS = .venv-peers
JOBS ?= 2
ARGS ?=

.PHONY: help demo quick check test test-official test-slow test-peers peers bench lint durations \
    golden constraints docs
help:
	@sed -n '3,21s/^# \{0,1\}//p' Makefile

# ---- Interpreters. A pyenv shim can exist and yet not run, so each candidate is tried.
PYENV_ROOT ?= $(HOME)/.pyenv
pyenv = $(wildcard $(PYENV_ROOT)/versions/$(1).*[0-9]/bin/python)
RUNS = import ensurepip, ssl, sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 14))
first = $(shell for p in $(1); do "$$p" -c '$(RUNS)' >/dev/null 2>&1 && echo "$$p" && break; done)

CANDIDATES := $(or $(PYTHON),python3.13 $(call pyenv,3.13) python3.12 $(call pyenv,3.12) \
    python3.11 $(call pyenv,3.11) python3)
INTERPRETER := $(call first,$(CANDIDATES))
ifeq ($(INTERPRETER),)
$(error a Python 3.11 to 3.13 with its venv module is needed; tried $(CANDIDATES). Name one: PYTHON=...)
endif

# ---- Environments. One is made anew when its interpreter or its place has changed, and brought up
# to date when pyproject.toml or the constraints have; otherwise nothing is installed twice.
ID = import sys, zlib; v = "%d.%d.%d" % sys.version_info[:3]; \
    print(v, zlib.crc32((sys.base_prefix + sys.argv[1]).encode()), sep="-")
MADE := $(VENV)/.made-$(shell "$(INTERPRETER)" -c '$(ID)' "$(CURDIR)")
UV = "$(VENV)/bin/python" -m uv

# An environment's folder $(1), made by interpreter $(2), with uv in it.
define make_venv
	@test ! -e $(1) || test -f $(1)/pyvenv.cfg || { echo "$(1) is not an environment"; exit 2; }
	rm -rf $(1)
	"$(2)" -m venv $(1)
	$(1)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt uv
endef

$(MADE):
	$(call make_venv,$(VENV),$(INTERPRETER))
	@touch $@

# The extras are the stamp's name: .venv/.has-demo, .venv/.has-test,official
$(VENV)/.has-%: $(MADE) pyproject.toml constraints.txt
	$(UV) pip install --python "$(VENV)/bin/python" -e '.[$*]' -c constraints.txt
	@touch $@

# ---- The demo. TEXT is handed over through the environment, unexpanded, so that quotes, dollars
# and backquotes in it stay what they are.
override TEXT := $(value TEXT)
export TEXT

demo: $(VENV)/.has-demo
	@mkdir -p out
	JAX_PLATFORMS=$${JAX_PLATFORMS:-cpu} $(VENV)/bin/gemma-scope inspect \
	    --html out/inspect.html -- "$${TEXT:-The capital of France is}"

# ---- Tests.
# A file stays on one process, which makes and compiles what its tests share once.
PYTEST = JAX_PLATFORMS=cpu $(VENV)/bin/python -m pytest
PARALLEL = -n $(JOBS) --dist loadscope

quick: $(VENV)/.has-test
	$(PYTEST) $(PARALLEL) -q -m quick $(ARGS)

check: lint quick

test: $(VENV)/.has-test
	$(PYTEST) $(PARALLEL) -m "not slow and not official and not peers" $(ARGS)

test-official: $(VENV)/.has-test,official
	$(PYTEST) $(PARALLEL) -m "not slow and not peers" $(ARGS)

test-slow: $(VENV)/.has-test
	$(PYTEST) -m "slow and not official and not peers" $(ARGS)

durations: $(VENV)/.has-test
	$(PYTEST) -q -p durations -m "not slow and not official and not peers"

lint: $(VENV)/.has-test
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

docs: $(VENV)/.has-docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict
	@echo "site/index.html"

constraints: $(MADE)
	$(UV) pip compile pyproject.toml --quiet --universal --python-version 3.11 --upgrade \
	    --extra test --extra official --extra tfds --extra track --extra docs \
	    --custom-compile-command "make constraints" --no-annotate --no-emit-index-url \
	    --output-file constraints.txt
	@$(UV) --version | sed 's/^uv \([0-9.]*\).*/uv==\1/' >> constraints.txt

# ---- Peers: transformers, SAELens, circuit-tracer, SAEBench, SAE-Probes and SAEDashboard beside us.
# Python 3.11, for which a CPU build of torch is easiest to have; pip installs torch (it honours a
# local wheel folder), uv the rest.
PEERS_PYTHON ?= $(call first,python3.11 $(call pyenv,3.11) $(INTERPRETER))
PEERS_PYTEST = JAX_PLATFORMS=cpu HF_HUB_OFFLINE=1 $(PEERS)/bin/python -m pytest

peers: $(PEERS)/.has

$(PEERS)/.made: constraints-peers.txt
	$(call make_venv,$(PEERS),$(PEERS_PYTHON))
	$(PEERS)/bin/python -m pip install --quiet -c constraints-peers.txt torch
	@touch $@

$(PEERS)/.has: $(PEERS)/.made pyproject.toml Makefile
	$(PEERS)/bin/python -m uv pip install --python $(PEERS)/bin/python -c constraints-peers.txt \
	    -e '.[demo]' pytest hypothesis transformers sae-lens circuit-tracer nnsight scikit-learn
	# without what they depend on: they want other numpy, pyarrow and transformer-lens, for parts
	# that no test runs
	$(PEERS)/bin/python -m uv pip install --python $(PEERS)/bin/python --no-deps \
	    sae-bench==0.6.0 sae-probes==0.4.2 sae-dashboard==0.8.0 tabulate==0.10.0 \
	    collectibles==0.1.5 eai-sparsify==1.3.3 dictionary-learning==0.1.0 simple-parsing==0.1.9 \
	    natsort==8.4.0 schedulefree==1.4.1
	# what circuit-tracer's page of graphs takes from the web; only its test needs it
	-npm install --prefix $(PEERS)/js --ignore-scripts --no-audit --no-fund \
	    d3@7 d3-jetpack@2.3.0 dagre@0.8.5 pako@2.1.0
	@touch $@

# A peer that is not there is a failure here, where it would be skipped otherwise.
test-peers: $(PEERS)/.has
	NO_SKIPS=1 $(PEERS_PYTEST) -m peers tests/peers $(ARGS)

golden: $(PEERS)/.has
	$(PEERS)/bin/python tests/golden/make_transformers.py
	$(PEERS)/bin/python tests/golden/make_circuit_tracer.py

APART = sides train_quality train_quality_peers train_share attribution_length circuits \
    circuits_clt circuits_results circuits_summary
bench: $(VENV)/.has-demo $(PEERS)/.has
	@for script in $(filter-out $(APART:%=benchmarks/%.py),$(wildcard benchmarks/*.py)); do \
	    echo "== $$script"; JAX_PLATFORMS=cpu $(VENV)/bin/python "$$script" || exit 1; done
