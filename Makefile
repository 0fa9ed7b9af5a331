# `make serve` and `make test` are the two commands to know; both make .venv first.
#
#   PYTHON=python3.12   which Python makes .venv (3.11 or newer)
#   TORCH=cpu           torch without CUDA: 2.5 GB less to download
#   MODEL, PRECISION, PORT, ARGS   passed to `halftone`; without them its own defaults hold

SHELL := /bin/bash
PYTHON ?= python3
# what .venv was made with is remembered
TORCH ?= $(if $(wildcard .venv/.installed-cpu),cpu,default)
ifeq ($(filter $(TORCH),cpu default),)
$(error TORCH=$(TORCH) is not known; accepted are cpu and default, which is torch with CUDA)
endif
BIN := .venv/bin
INSTALLED := .venv/.installed-$(TORCH)
TESTABLE := .venv/.testable-$(TORCH)
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
# A CPU build of torch brings no Triton, whose interpreter runs our kernels in the tests. A CUDA build pins its
# own version, so this one cannot stand in constraints.txt.
TRITON := triton==3.6.0

# Files of tests side by side, each whole in one process: its servers and models are made once.
WORKERS := --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.PHONY: serve compare install test check format clean
.DELETE_ON_ERROR:

serve: $(INSTALLED)
	@exec $(BIN)/halftone serve $(MODEL) $(if $(PRECISION),--precision $(PRECISION)) $(if $(PORT),--port $(PORT)) $(ARGS)

compare: $(INSTALLED)
	@exec $(BIN)/halftone compare $(or $(MODEL),demo) --out $(or $(OUT),report) $(ARGS)

install: $(INSTALLED)

test: check
	$(BIN)/pytest $(WORKERS)

check: $(TESTABLE)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(TESTABLE)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis

.venv/bin/python:
	@command -v "$(PYTHON)" >/dev/null || { \
		echo "\`$(PYTHON)\` is not installed; Halftone needs Python 3.11 or newer"; \
		echo "  hint: name one that is: make install PYTHON=python3.12"; exit 4; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "\`$(PYTHON)\` is $$("$(PYTHON)" -V 2>&1); Halftone needs Python 3.11 or newer"; \
		echo "  hint: name a newer one: make install PYTHON=python3.12"; exit 4; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "\`$(PYTHON)\` cannot make virtual environments: its venv package is missing"; \
		echo "  hint: Debian, Ubuntu: apt install python3-venv"; exit 4; }
	"$(PYTHON)" -m venv .venv
	@# since 24.1 pip tells its progress in numbers, which the bar of the demo model needs
	@$(PIP) install -q pip==26.3

$(INSTALLED): pyproject.toml constraints.txt | .venv/bin/python
ifeq ($(TORCH),cpu)
	@echo "Installing into .venv: 0.30 GB to download the first time"
	$(PIP) install -c constraints.txt torch --extra-index-url https://download.pytorch.org/whl/cpu
	@$(BIN)/python -c 'import sys, torch; sys.exit(torch.version.cuda is not None)' || { \
		echo ".venv has a torch with CUDA already"; echo "  hint: make clean install TORCH=cpu"; exit 4; }
else
	@echo "Installing into .venv: 2.84 GB to download the first time (torch with CUDA; TORCH=cpu: 0.30 GB)"
	$(PIP) install -c constraints.txt torch
endif
	$(PIP) install -q -c constraints.txt -e .
	@touch $@

$(TESTABLE): $(INSTALLED)
	$(PIP) install -q -c constraints.txt -e '.[dev]'
	@$(BIN)/python -c 'import sys, torch; sys.exit(torch.version.cuda is None)' || $(PIP) install -q $(TRITON)
	@touch $@
