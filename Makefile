VENV ?= .venv
PYTHON ?= python3
RUN := $(VENV)/bin/python

.PHONY: help setup reproduce report benchmark test lint
help: ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(VENV)/.ready ## make the virtual environment (the other targets do it themselves)

$(VENV)/.ready: pyproject.toml scripts/setup.sh
	@PYTHON=$(PYTHON) bash scripts/setup.sh $(VENV)

reproduce: setup ## run what a laptop can, resuming what was cut, and write results/report/index.html
	@PYTHON=$(RUN) bash scripts/reproduce.sh

report: setup ## render tables and figures of the committed runs in results/published
	@$(RUN) scripts/report.py

benchmark: setup ## measure speed and memory against the alternatives, side by side
	@$(RUN) scripts/benchmark.py

test: setup ## run the tests
	@OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n auto

lint: setup ## check style
	@$(RUN) -m ruff check . && $(RUN) -m ruff format --check .
