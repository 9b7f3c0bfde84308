# `make demo`, `make studies`, `make test`. Everything installs into .venv from one lock file.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RESULTS ?= results
OUT ?= $(RESULTS)/reproduce
MODEL ?= demo
STUDIES := $(filter-out analyses/compare_methods.py,$(shell grep -l '(StudyConfig)' analyses/*.py))

.PHONY: demo studies compare page figures test check bench clean

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

# Every study of refusal (each analysis whose Config is a StudyConfig), then one page of all results. Each resumes.
studies: $(VENV)/.ready
	@for study in $(STUDIES); do \
		echo "== $$study" && \
		$(BIN)/python $$study --model $(MODEL) --out $(RESULTS)/$$(basename $$study .py) --scores $(RESULTS)/scores || exit; \
	done
	$(MAKE) --no-print-directory page

# Every related method under one protocol, resumable by method; the longest of the studies.
compare: $(VENV)/.ready
	$(BIN)/python analyses/compare_methods.py --model $(MODEL) --out $(RESULTS)/compare_methods --scores $(RESULTS)/scores
	$(MAKE) --no-print-directory page

# One page of every stored result of a model; no model is loaded.
page: $(VENV)/.ready
	$(BIN)/python analyses/page.py --results $(RESULTS) --out $(RESULTS)/index.html

# Redraw the figures of every stored result, and the page; no model is loaded.
figures: $(VENV)/.ready
	$(BIN)/python -c 'from rsteer_interp.report.drawing import redraw; print(*redraw("$(RESULTS)", "figures"), sep="\n")'
	$(MAKE) --no-print-directory page

# Lint, types, import contract, and every test, the real demo model's included.
test: $(VENV)/.ready check
	$(BIN)/python -m pytest

check: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Time and memory beside other ways to the same numbers, on the demo model. Run it on a quiet machine. NNSIGHT: a Python that has
# nnsight, which needs an environment of its own.
bench: $(VENV)/.ready
	@mkdir -p $(RESULTS)/benchmarks
	$(BIN)/python -m pytest -o addopts= -q tests/benchmarks --bench-model $(MODEL) --bench-nnsight "$(NNSIGHT)" \
		--benchmark-quiet --benchmark-json=$(RESULTS)/benchmarks/rounds.json
	$(BIN)/python -m tests.benchmarks.report --rounds $(RESULTS)/benchmarks/rounds.json --out $(RESULTS)/benchmarks

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
