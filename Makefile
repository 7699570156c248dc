# make demo   train a 32-layer GCNII on handwritten digits through a pipeline of four processes
# make test   the whole gate: ruff, ruff format, mypy, import-linter, pytest
#
# Both set up .venv themselves and need only Python 3.11 or newer and git.
#   make PYTHON=python3.12 test     another interpreter
#   make PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu" demo
#                                   torch without CUDA: 200 MB to fetch instead of gigabytes

PYTHON ?= $(shell command -v python3.11 || echo python3)
PIP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
# A stamp says what is installed. It is older than these files exactly when the install is.
INPUTS := setup.cfg pyproject.toml constraints.txt
RUN_STAMP := $(VENV)/run.stamp
DEV_STAMP := $(VENV)/dev.stamp
PIP_INSTALL = $(BIN)/python -m pip install --disable-pip-version-check -q $(PIP_ARGS) -c constraints.txt
# A plain path: the default editable install loses to a folder named gnnpipe beside a user's script,
# such as this checkout seen from its parent.
EDITABLE = --config-settings editable_mode=compat -e

.DEFAULT_GOAL := help
.PHONY: help demo test clean

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -7

demo: $(RUN_STAMP)
	rm -rf runs/demo
	$(BIN)/python -m launch local --nproc 4 examples/configs/demo.yaml
	@echo "curves: $(BIN)/tensorboard --logdir runs/demo/tensorboard"

test: $(DEV_STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest

$(RUN_STAMP): $(INPUTS)
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || \
	{ echo "error: $(PYTHON) is older than Python 3.11; name a newer one: make PYTHON=... $(MAKECMDGOALS)" >&2; exit 2; }
	@echo "installing into $(VENV): minutes the first time, nothing afterwards"
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) $(EDITABLE) .
	touch $@

$(DEV_STAMP): $(RUN_STAMP)
	$(PIP_INSTALL) $(EDITABLE) '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) runs/demo build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
