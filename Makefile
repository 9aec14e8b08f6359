# make demo | test | lint | fuzz | soak | engines | test-engines: each makes the virtual environment first, once.

PYTHON ?= python3
# The CPU needs no more than PyPI's torch; an engine's container has its own: make venv TORCH=
TORCH ?= torch==2.13.0
VENV ?= .venv
OUT ?= demo-out
# Real engines for tests: `make engines ENGINE_PARTS=kvbm` makes some of them.
KVTC_ENGINES ?= .engines
ENGINE_PARTS ?= kvbm dynamo vllm
# Processes that tests run in, a file of tests in one of them.
WORKERS ?= 2
# Arguments for `kvtc demo`, pytest.
ARGS ?=

WITH_ENGINES := OMP_NUM_THREADS=1 KVTC_ENGINES=$(abspath $(KVTC_ENGINES))
PYTEST := $(VENV)/bin/python -m pytest -q
# In their own order: what takes longest, with real engines, comes early.
SPREAD := -n $(WORKERS) --dist loadfile --no-loadscope-reorder
PIP := $(VENV)/bin/python -m pip --quiet --disable-pip-version-check
STAMP := $(VENV)/.made

.PHONY: demo test lint fuzz soak engines test-engines venv clean

demo: $(STAMP)
	$(VENV)/bin/kvtc demo --out $(OUT) $(ARGS)

# One thread a process: the tests' tensors are small, and results do not depend on it. Engines that are made are tested,
# too, in a short form.
test: $(STAMP)
	$(WITH_ENGINES) $(PYTEST) $(SPREAD) $(ARGS)

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

fuzz: $(STAMP)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m tests.fuzz_records --records 20000 --artifacts 500

# KVTC_SOAK_MINUTES (30) of conversations over one tier; store and tier, each killed a hundred times while they write,
# and vLLM, where it is made, 20 times; then every test on data it has not seen.
soak: $(STAMP)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m tests.soak_tier
	OMP_NUM_THREADS=1 KVTC_KILLS=100 $(PYTEST) tests/store/test_crash.py tests/tier/test_killed.py $(ARGS)
	$(WITH_ENGINES) KVTC_TEST_SEED=fresh KVTC_KILLS=20 $(PYTEST) tests/adapters/vllm/test_killed.py $(ARGS)
	$(WITH_ENGINES) KVTC_TEST_SEED=fresh $(PYTEST) $(SPREAD) $(ARGS)

# kvbm: three leaders, 20 seconds, 0.6 GB. dynamo: vLLM with Dynamo and a NATS server, 5
# minutes on 2 cores, 2.8 GB. vllm: that one, or one without Dynamo, 2.4 GB.
engines: $(STAMP)
	tests/engines/install $(KVTC_ENGINES) $(VENV)/bin/python $(ENGINE_PARTS)

test-engines: engines
	$(WITH_ENGINES) $(PYTEST) -m engine $(ARGS)

venv: $(STAMP)

$(STAMP): pyproject.toml
	@echo "installing into $(VENV) (once, a few minutes): $(TORCH), this package and its tools"
	@$(PYTHON) -m venv $(VENV)
	@test -z "$(TORCH)" || $(PIP) install "$(TORCH)"
	@$(PIP) install -e ".[dev]"
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
