# `make demo` and `make test` do all their own set-up with a Python of 3.11 or newer; `make help` lists the rest.
PYTHON ?= python3
VENV ?= .venv
VENV_OLDEST ?= .venv-oldest
PYTEST_ARGS ?=
NODE_MODULES := tests/javascript/node_modules/.installed
# Processes that share the tests. Each needs a core and about 1.5 GB.
TEST_WORKERS ?= 2

WORKERS = -n $(TEST_WORKERS) --dist worksteal
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check
# Spelled out, so that `accelerate launch` neither asks for a configuration nor warns, takes one GPU if there is one,
# and takes half of the cores for arithmetic while the others decode.
LAUNCH_ARGS = --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
	--num_cpu_threads_per_process $$($(VENV)/bin/python -c "import os; print(max(1, os.cpu_count() // 2))")

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test test-faults test-long lint types docs test-oldest test-matrix test-javascript test-browser clean

help:  ## Show this list
	@awk -F ':.*  ## ' '/^[a-z-]+:.*  ## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "  PYTHON=python3.12 names another Python, PYTEST_ARGS='-k sampler' narrows the tests, TEST_WORKERS=4 shares them."

demo: $(VENV)/.demo-installed  ## Train on real images of four small domains and show the tables (minutes, no GPU)
	@$(VENV)/bin/accelerate launch $(LAUNCH_ARGS) train_udon.py --config configs/demo.yaml --overwrite
	@echo
	@$(VENV)/bin/python examples/search_page.py runs/demo
	@echo
	@echo "Where to look:"
	@echo "  runs/demo/best/           the student, ready for the Hub: AutoModel loads it with trust_remote_code=True"
	@echo "  runs/demo/report.html     tables, curves, confusion and galleries of neighbours, for a browser"
	@echo "  runs/demo/page/           a search page that runs in your browser; the line above says how to open it"
	@echo "  runs/demo/results.json    the tables above, as numbers"
	@echo "  runs/demo/metrics.jsonl   losses and sampling weights of the whole run"
	@echo "  runs/demo/config.yaml     every setting and version, to run it again"

test: lint types  ## Check style and types, then run all tests
	@$(VENV)/bin/python -m pytest $(WORKERS) $(PYTEST_ARGS)

lint: $(VENV)/.dev-installed  ## Check style
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .

types: $(VENV)/.dev-installed  ## Check types
	@$(VENV)/bin/mypy

docs: $(VENV)/.dev-installed  ## Build the documentation site into build/docs; a warning is an error
	@$(VENV)/bin/sphinx-build -q -W --keep-going -b html docs build/docs
	@echo "open build/docs/index.html"

test-faults: $(VENV)/.dev-installed  ## Break runs and inputs in every way that is promised for, and show a table (an hour)
	@$(VENV)/bin/python -m pytest tests/faults -m "long or not long" $(PYTEST_ARGS)

test-long: $(VENV)/.dev-installed  ## Run the slow tests that `make test` leaves out, such as all types of backbones
	@$(VENV)/bin/python -m pytest -m long --ignore tests/faults $(PYTEST_ARGS)

# Old libraries warn about what came after them, so a warning is no error here.
test-oldest: $(VENV_OLDEST)/.dev-installed  ## Run all tests with the oldest supported versions
	@$(VENV_OLDEST)/bin/python -m pytest -W default --disable-warnings $(WORKERS) $(PYTEST_ARGS)

# What is pushed has to load with both: the oldest supported transformers 4 and the tested 5, each by itself.
test-matrix: $(VENV)/.dev-installed $(VENV_OLDEST)/.dev-installed $(NODE_MODULES)  ## Push and load with the oldest and the tested versions
	@$(VENV_OLDEST)/bin/python -c "import transformers; print('transformers', transformers.__version__)"
	@$(VENV_OLDEST)/bin/python -m pytest -W default --disable-warnings tests/hub $(PYTEST_ARGS)
	@$(VENV)/bin/python -c "import transformers; print('transformers', transformers.__version__)"
	@$(VENV)/bin/python -m pytest tests/hub $(PYTEST_ARGS)

# The page is tested with the runtime that npm installs here, in the version that udon export-page downloads.
$(NODE_MODULES): tests/javascript/package-lock.json
	@cd tests/javascript && npm ci --ignore-scripts --no-audit --no-fund --silent
	@touch $@

test-javascript: $(VENV)/.dev-installed $(NODE_MODULES)  ## Run exported students and pages in Node (needs Node 20 and npm)
	@$(VENV)/bin/python -m pytest tests/hub/test_javascript.py -rs -s $(PYTEST_ARGS)

test-browser: $(VENV)/.dev-installed $(NODE_MODULES)  ## Open an exported page in Chromium (needs npm and a Chromium)
	@$(VENV)/bin/python -m pytest tests/hub/test_page_browser.py -rs $(PYTEST_ARGS)

clean:  ## Remove environments, builds and caches; runs/ stays
	rm -rf $(VENV) $(VENV_OLDEST) build dist modeling_udon.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is touched last: what was interrupted is done again.
%/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, $(PYTHON) is %d.%d. Name another one: make PYTHON=/path/to/python3.12" % sys.version_info[:2])'
	@$(PYTHON) -m venv --clear $(@D)
	@touch $@

$(VENV)/.demo-installed: pyproject.toml constraints.txt | $(VENV)/.created
	@echo "Installing the tested versions into $(VENV), which takes some minutes the first time"
	@$(VENV)/bin/python $(PIP_INSTALL) -c constraints.txt -e ".[demo-data,export]"
	@touch $@

$(VENV)/.dev-installed: pyproject.toml constraints.txt | $(VENV)/.created
	@echo "Installing the tested versions and the developer's tools into $(VENV), which takes some minutes the first time"
	@$(VENV)/bin/python $(PIP_INSTALL) -c constraints.txt -e ".[dev,docs,demo,demo-data,export,engines,openvino,postgres,serve]"
	@touch $@ $(VENV)/.demo-installed

$(VENV_OLDEST)/.dev-installed: pyproject.toml constraints-oldest.txt | $(VENV_OLDEST)/.created
	@echo "Installing the oldest supported versions into $(VENV_OLDEST), which takes some minutes the first time"
	@$(VENV_OLDEST)/bin/python $(PIP_INSTALL) -c constraints-oldest.txt -e ".[dev,demo-data]"
	@touch $@
