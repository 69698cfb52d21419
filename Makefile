# `make demo` and `make test` need Python 3.10 or newer, git and a package index; everything else goes into .venv.
# Another interpreter: make PYTHON=python3.12 VENV=.venv312 test

PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
CONSTRAINTS ?= constraints.txt

# Nothing here needs the Hub; with this set, a call that would reach for it says so instead of waiting for a network.
HF_HUB_OFFLINE ?= 1
export HF_HUB_OFFLINE

PACKAGE := $(shell find dfu_diffusers -name '*.py' 2>/dev/null)
CHECKPOINT := $(shell find checkpoints -type f 2>/dev/null)

# The stamp of a passed test run is named after the contents of all that the tests read: the same files have the same
# stamp, whatever their times, and a change (also one made while the tests run) has none yet.
TESTED := dfu_diffusers tests examples benchmarks experiments checkpoints docs README.md model_card.md Makefile setup.py \
	pyproject.toml constraints.txt
CHECKSUM := $(shell find $(TESTED) -type f ! -path '*/__pycache__/*' 2>/dev/null | LC_ALL=C sort | xargs cksum \
	| cksum | cut -d ' ' -f 1)
PASSED := $(VENV)/passed-$(CHECKSUM)
ifdef FORCE_TESTS
.PHONY: $(PASSED)
endif

.DEFAULT_GOAL := help
.PHONY: help demo docs test test-oldest test-slow quality style bench clean
.DELETE_ON_ERROR:
.NOTPARALLEL:
.SECONDARY:

help:  ## Show this list.
	@sed -n 's/^\([a-z-]*\):.*## /  make \1	/p' $(firstword $(MAKEFILE_LIST)) | expand -t 20

demo: outputs/demo.png  ## Generate the demo pictures: outputs/demo.png.
	@echo "See outputs/demo.png"

docs: $(VENV)/installed-docs  ## Build guides and API reference: outputs/site/index.html.
	$(PY) -m mkdocs build --quiet
	@echo "See outputs/site/index.html"

test: $(PASSED)  ## Run the tests, except the slow ones. FORCE_TESTS=1 runs them even if nothing changed.
	@echo "Tests passed for the files as they are."

# What it leaves out is another package's doing: diffusers 0.40 offloads groups only where there is an accelerator.
test-oldest:  ## Run the tests with the oldest releases that setup.py admits: constraints-oldest.txt.
	$(MAKE) VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt ALSO=transformers .venv-oldest/installed-test
	.venv-oldest/bin/python -m pytest -n auto --maxprocesses 4 --dist worksteal \
		--deselect tests/test_modeling_dfu.py::test_offloading \
		--deselect tests/test_interoperability.py::test_group_offload_of_a_pipeline \
		--deselect tests/test_interoperability.py::test_group_offload_with_lora

test-slow: $(VENV)/installed-test  ## Run the slow tests alone.
	$(PY) -m pytest -m slow

quality: $(VENV)/installed-quality  ## Check style and formatting.
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

style: $(VENV)/installed-quality  ## Fix style and formatting.
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: $(VENV)/installed-test  ## Measure speed and memory: each benchmarks/bench_*.py.
	@set -e; for script in benchmarks/bench_*.py; do echo "$$script"; $(PY) "$$script"; done

clean:  ## Remove what make made: .venv*, outputs/demo.png, build files and caches. Other outputs stay.
	rm -rf $(VENV) .venv-oldest outputs/demo.png build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

outputs/demo.png: $(VENV)/installed-demo examples/demo.py $(PACKAGE) $(CHECKPOINT)
	@mkdir -p outputs
	$(PY) examples/demo.py
	@touch $@

$(PASSED): $(VENV)/installed-test
	@rm -f $(VENV)/passed-*
	$(PY) -m pytest -n auto --maxprocesses 4 --dist worksteal
	@touch $@

# One stamp per extra. The package is installed in place, so changing its code asks for no new installation.
$(VENV)/installed-%: setup.py $(CONSTRAINTS) | $(VENV)/bin/pip
	@echo "Installing into $(VENV): a few minutes the first time."
	$(PY) -m pip install --disable-pip-version-check --progress-bar off -c $(CONSTRAINTS) -e ".[$*]" $(ALSO)
	@touch $@

# pip comes last into a new environment, so one that was left half made is made again.
$(VENV)/bin/pip:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) was not found. Install Python 3.10 or newer, or name the one" \
		"to use: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit("$(PYTHON) is Python %d.%d; 3.10 or newer is needed. \
	Name the one to use: make PYTHON=python3.12" % v if v < (3, 10) else 0)'
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) cannot make virtual environments." \
		"Install its venv module (on Debian and Ubuntu: apt install python3-venv)." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
