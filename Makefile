# make demo | test | test-long | test-browser | lint: the environment is made on first use, with python3, pip and a
# package index alone.
#
#   PYTHON  the interpreter, 3.11 or newer
#   VENV    the environment's folder
#   JOBS    processes of `make test`
#   TORCH   what pip installs torch from. The default takes what the index serves (on PyPI a CUDA build of
#           several GB); a CPU build: make demo TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
JOBS ?= 2

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check
# one thread: compiled CPU code is many times slower with two on a shared machine
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: demo test test-long test-browser lint
.DELETE_ON_ERROR:

demo: $(VENV)/.core
	$(BIN)/dlx generate "Tom has 19 shells. He finds 12 more. Maya gives Tom 14 more. He loses 10 of them. \
	He gets 5 shells from his sister. How many shells does Tom have in the end?"

test: $(VENV)/.dev
	$(PYTEST) -n $(JOBS) -m "not gpu and not multi_gpu and not long and not interp and not browser"
	TRITON_INTERPRET=1 $(PYTEST) -n $(JOBS) -m interp

test-long: $(VENV)/.dev
	$(PYTEST) -n $(JOBS) -m long

# Debian's Chromium, if there is none and this may install it; without it the tests are skipped
test-browser: $(VENV)/.browser
	command -v chromium >/dev/null || [ "$$(id -u)" -ne 0 ] || { apt-get update && apt-get install --yes chromium; }
	$(PYTEST) tests/browser -m browser --screenshots docs

lint: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	"dlx needs Python 3.11 or newer, this is " + sys.version + "; name another: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.core: pyproject.toml | $(BIN)/python
	$(PIP) $(TORCH)
	$(PIP) --quiet --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.core
	$(PIP) --quiet --editable '.[dev,eval,serve]'
	@touch $@

$(VENV)/.browser: $(VENV)/.dev
	$(PIP) --quiet --editable '.[serve,browser]'
	@touch $@
