# `make demo`, `make quick` and `make test` work on a fresh machine with Python 3.10 to 3.13.
PYTHON ?= python3
VENV ?= .venv
PIP = $(VENV)/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: demo quick test coverage lint faults fuzz soak benchmarks families
demo: $(VENV)/.demo
	rm -rf demo-pruned demo-pruned-eval
	$(VENV)/bin/python cli.py prune lowmem_wanda/data/demo demo-pruned --pattern 2:4
	$(VENV)/bin/python cli.py check demo-pruned --against lowmem_wanda/data/demo
	$(VENV)/bin/python cli.py eval demo-pruned --against lowmem_wanda/data/demo --text lowmem_wanda/data/held-out.txt

# two processes of one thread each: threads that wait for each other on two cores take several times as long
PYTEST = OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist worksteal

quick: $(VENV)/.test
	$(PYTEST) -m "not slow"

test: $(VENV)/.test
	$(PYTEST)

coverage: $(VENV)/.test
	$(VENV)/bin/python -m coverage run -m pytest
	$(VENV)/bin/python -m coverage report

faults: $(VENV)/.test
	FAULTS=200 $(VENV)/bin/python -m pytest tests/test_faults.py

MINUTES ?= 5
fuzz: $(VENV)/.test
	FUZZ_MINUTES=$(MINUTES) $(VENV)/bin/python -m pytest tests/test_fuzz.py

benchmarks: $(VENV)/.test
	BENCHMARKS=1 $(VENV)/bin/python -m pytest tests/test_benchmarks.py

families: $(VENV)/.test  # about six minutes; writes lowmem_wanda/docs/families.md
	-$(VENV)/bin/python tests/families/run.py --again
	$(VENV)/bin/python tests/families/table.py

soak: $(VENV)/.test
	SOAK=300 $(VENV)/bin/python -m pytest tests/test_soak.py

lint: $(VENV)/.test
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m ruff format --check .
	$(VENV)/bin/python -m mypy

$(VENV)/.demo: setup.cfg constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable ".[plots,gguf]"
	touch $@

$(VENV)/.test: setup.cfg constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable ".[test]"
	touch $@
