# Every target sets itself up: the virtual environment is made and filled when it is missing or old.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
INTEGRATIONS := $(VENV)/.integrations
PYTEST := $(BIN)/python -m pytest -q
export TOKENIZERS_PARALLELISM = false

.DEFAULT_GOAL := help
.PHONY: help demo test check check-all peft bench gpu lint types imports format clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

$(READY): pyproject.toml constraints.txt setup.py
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fslora needs Python 3.11 or newer; call: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(READY)  ## twenty clients of unequal strength fine-tune one model (under two minutes)
	$(BIN)/fslora simulate --preset demo --out runs/demo-$$(date +%Y%m%d-%H%M%S)

test: $(READY)  ## the fast tests, and the Triton kernels in the interpreter
	$(PYTEST) -m 'not slow and not gpu and not interpreter'
	TRITON_INTERPRET=1 $(PYTEST) -m 'interpreter and not slow'

lint: $(READY)  ## ruff: lint and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)  ## mypy --strict
	$(BIN)/mypy

imports: $(READY)  ## who may import whom
	$(BIN)/lint-imports

check: lint types imports test  ## what CI runs

$(INTEGRATIONS): $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[integrations]'
	@touch $@

check-all: lint types imports $(INTEGRATIONS)  ## the long tiers too: kills, wide compilation, trainers, quantised bases
	$(PYTEST) -m 'not gpu and not interpreter'
	TRITON_INTERPRET=1 $(PYTEST) -m interpreter

peft: $(INTEGRATIONS)  ## PEFT's own LoRA tests, vanilla and fused, into docs/peft.md (about ten minutes)
	$(BIN)/python -m tests.peft_suite

bench: $(READY)  ## one adapted layer beside its peers at every sketch ratio (about ten minutes)
	$(BIN)/python -m benchmarks layer --figure runs/bench.png

# A machine with a GPU often has torch, and no network to fill a virtual environment from.
SEES_GPU := -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'
gpu:  ## every GPU check in one script (ARGS='--only ...'); says what it skips without a GPU
	@if $(PYTHON) $(SEES_GPU) 2>/dev/null; then $(PYTHON) -m benchmarks gpu $(ARGS); \
	else $(MAKE) $(READY) && $(BIN)/python -m benchmarks gpu $(ARGS); fi

format: $(READY)  ## rewrite the code in the project's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove the virtual environment and caches
	rm -rf $(VENV) build .mypy_cache .ruff_cache .pytest_cache .hypothesis
