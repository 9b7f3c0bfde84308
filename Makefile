# Two commands: `make demo` and `make test`. Everything installs into .venv from one lock file.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= results/reproduce

.PHONY: demo test check figures clean

# The environment is ready when its stamp is newer than the lock; an interrupted install starts over from pip's cache.
$(VENV)/.ready: requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; give it as: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --progress-bar off -r requirements.lock
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps --no-build-isolation -e .
	touch $@

# Get the demo model, run the main paper's experiment on it, draw the figures and write the page.
demo: $(VENV)/.ready
	$(BIN)/python analyses/reproduce.py --out $(OUT)

# Lint, types, import contract, and every test, the real demo model's included.
test: $(VENV)/.ready check
	$(BIN)/python -m pytest

check: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Redraw every figure from stored results; no model is loaded.
figures: $(VENV)/.ready
	$(BIN)/python -c 'from rsteer_interp.report.drawing import draw_figures; print(*draw_figures("$(OUT)", "$(OUT)/figures", "figures"), sep="\n")'

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
