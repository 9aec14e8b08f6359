# make demo | test | lint | fuzz | soak: each makes the virtual environment first, once.

PYTHON ?= python3
# The CPU needs no more than PyPI's torch; an engine's container has its own: make venv TORCH=
TORCH ?= torch==2.13.0
VENV ?= .venv
OUT ?= demo-out
# Arguments for `kvtc demo`, pytest.
ARGS ?=

PIP := $(VENV)/bin/python -m pip --quiet --disable-pip-version-check
STAMP := $(VENV)/.made

.PHONY: demo test lint fuzz soak venv clean

demo: $(STAMP)
	$(VENV)/bin/kvtc demo --out $(OUT) $(ARGS)

# One thread a process: the tests' tensors are small, and results do not depend on it.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -q $(ARGS)

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

fuzz: $(STAMP)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m tests.fuzz_records --records 20000 --artifacts 500

# The disk tier, killed a hundred times while it writes.
soak: $(STAMP)
	KVTC_KILLS=100 $(VENV)/bin/python -m pytest -q tests/store/test_crash.py $(ARGS)

venv: $(STAMP)

$(STAMP): pyproject.toml
	@echo "installing into $(VENV) (once, a few minutes): $(TORCH), this package and its tools"
	@$(PYTHON) -m venv $(VENV)
	@test -z "$(TORCH)" || $(PIP) install "$(TORCH)"
	@$(PIP) install -e ".[dev]"
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
