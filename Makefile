# Every target works from a bare clone: it installs what it needs first, and only once.
#   make demo   train CO-BYOL on a small generated picture set, end to end (about three minutes on 2 CPU cores)
#   make test   the test suite        make lint type   ruff, import contracts, mypy        make setup   install only
#   make test-long   the tests that take minutes (kills at random moments)
#   make test-slurm  the tests on a real SLURM on this machine alone (needs root; installs Debian's packages);
#                    with slurmdbd and MariaDB too: make test-slurm ACCOUNTING=dbd
#   make test-browser  the tests that look at a report in a real browser (as root on Debian it installs Chromium)
#   make bench  our loaders beside their peers (within five minutes)
#   make gpu-report   everything that needs a GPU, within ten minutes; without network: python -m cossl.tools.gpu_report
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
ACCOUNTING ?= none

.PHONY: demo setup test test-long test-slurm test-browser lint type bench gpu-report clean

demo: setup
	$(BIN)/cossl train demo

setup: $(READY)

$(READY): pyproject.toml constraints.txt tools/setup.sh
	PYTHON="$(PYTHON)" sh tools/setup.sh $(VENV)
	touch $@

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-long: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m long

test-slurm: setup
	sh tools/setup_slurm.sh $(ACCOUNTING)
	COSSL_REQUIRE_SLURM=$(ACCOUNTING) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 0 -m slurm

test-browser: setup
	sh tools/setup_browser.sh
	COSSL_REQUIRE_BROWSER=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 0 tests/test_report_browser.py

lint: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/lint-imports

type: setup
	mkdir -p build/ns && ln -sfn ../.. build/ns/cossl
	$(BIN)/mypy

bench: setup
	$(BIN)/cossl bench loaders --quick

gpu-report: setup
	$(BIN)/python -m cossl.tools.gpu_report

clean:
	rm -rf $(VENV) build dist *.egg-info
