# Everything needs only python3 (3.11 or newer, with venv) and make: the first target that needs an environment makes .venv.

PYTHON ?= python3
# Three on two cores: browsers, launchers and kernels that start leave a core idle now and then.
WORKERS ?= 3
LAB_ARGS ?=

VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
KERNELS := $(VENV)/.kernels
LAB_SETTINGS := $(VENV)/share/jupyter/lab/settings
LESSONS := $(wildcard lessons/*.ipynb)
SOLUTIONS := $(wildcard solutions/*.ipynb)

# Tests use no network. One thread for each worker: two workers on two cores would otherwise fight for them.
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
NBVAL := $(PY) -m pytest -n $(WORKERS) --dist loadscope --nbval-current-env --nbval-cell-timeout 120

.DEFAULT_GOAL := help
.PHONY: help lab test test-browser test-gpu data notebooks check-notebooks clean moved

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-16s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

lab: $(READY) ## open JupyterLab on the first lesson
	cd lessons && ../$(PY) -m jupyter lab --LabApp.default_url=/lab/tree/00_tour.ipynb \
	    $(if $(filter 0,$(shell id -u)),--allow-root) $(LAB_ARGS)

test: $(READY) $(KERNELS) ## check the style, run every test and every notebook
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
ifneq ($(SOLUTIONS),)
	$(TEST_ENV) $(NBVAL) --nbval $(SOLUTIONS)
endif
ifneq ($(LESSONS),)
	$(TEST_ENV) $(NBVAL) --nbval-lax $(LESSONS)
endif
	$(TEST_ENV) $(PY) -m pytest -n $(WORKERS) --dist loadscope --no-loadscope-reorder --ignore tests/browser/test_the_tests.py --ignore tests/browser/test_first_minute.py

test-browser: $(READY) ## open every lesson in a browser and move every control; pictures go to runs/screenshots
	$(TEST_ENV) $(PY) -m pytest -p no:cacheprovider tests/browser --all-lessons --screenshots runs/screenshots

test-gpu: $(READY) $(KERNELS) ## run FP8 on a Hopper GPU; on any other machine it says what is missing
	$(TEST_ENV) $(PY) -m pytest -rs tests/gpu

data: $(READY) ## rebuild what data/ holds, and check that a second build gives the same bytes
	$(PY) -m dsv3_mini.data.build
	$(PY) -m dsv3_mini.data.build --check

notebooks: $(READY) ## build and run both notebooks of every lesson from solutions/*.py
	$(PY) -m dsv3_mini.course.build

check-notebooks: $(READY) ## build them all beside, and say whether a byte differs
	$(PY) -m dsv3_mini.course.build --check

clean: ## remove .venv and caches (data/ and runs/ stay)
	rm -rf $(VENV) dist .pytest_cache .ruff_cache .hypothesis
	find dsv3_mini tests lessons solutions -name __pycache__ -o -name .ipynb_checkpoints 2>/dev/null | xargs rm -rf

# An environment holds the paths of its folder: after a move it is made again. The stamp remembers where it was made.
ifneq ($(shell cat $(READY) 2>/dev/null),$(CURDIR))
$(READY): moved
endif

$(READY): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { \
	    echo "make: there is no '$(PYTHON)' here: install Python 3.11 or newer, or name one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "make: '$(PYTHON)' is $$($(PYTHON) --version 2>&1), the course needs 3.11 or newer: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo "make: '$(PYTHON)' has no venv: install it (Debian, Ubuntu: apt install python3-venv), then run make again" >&2; exit 1; }
	@echo "make: setting up $(VENV), once; torch and JupyterLab take some minutes"
	@$(PYTHON) -m venv $(VENV)
	@$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@mkdir -p $(LAB_SETTINGS) # no news dialog over the first lesson, and no network
	@echo '{"@jupyterlab/apputils-extension:notification": {"checkForUpdates": false, "fetchNews": "false"}}' \
	    > $(LAB_SETTINGS)/overrides.json
	@echo '$(CURDIR)' > $@

# Triton takes a gigabyte and only the tests of the FP8 kernels want it: the lessons do without.
$(KERNELS): $(READY)
	@$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,kernels]'
	@touch $@
