# Six words: make setup, demo, test, check, faults, bench. Each creates .venv and installs what it needs.
# For bench there are bench-peers, which installs the systems it compares with, bench-gpu, and bench-advice, which holds
# advice against what is measured: memory, the choice of a method, runs under a limit (three hours in all).
PYTHON ?= python3.11
BIN := .venv/bin
TORCH := torch==2.13.0
export OMP_NUM_THREADS ?= $(shell nproc)
SIDE_BY_SIDE = OMP_NUM_THREADS=1 PYTHONHASHSEED=0 $(BIN)/python -m pytest -n $(OMP_NUM_THREADS)

.PHONY: setup demo test check faults bench bench-advice bench-peers bench-gpu clean

setup: .venv/.installed

# torch comes first and pinned: left to a wider requirement, pip takes a build with gigabytes of CUDA libraries.
.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

.venv/.installed-test: .venv/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@

demo: .venv/.installed
	$(BIN)/tunewright demo

# Tiny models are fastest on one thread each: tests run side by side, one process a core. Those that are timed run alone.
# The processes must name tests alike, also those named after sets.
# Coverage is that of the unit tests: contract tests do the same for every method, most of what end-to-end and fault
# tests run is in child processes, and it makes tests take half as long again.
# A group is of tests that share something dear. End-to-end tests come first: their longest group takes minutes.
test: .venv/.installed-test
	$(SIDE_BY_SIDE) --dist worksteal tests/unit --cov --cov-report=term
	$(SIDE_BY_SIDE) --dist loadgroup --no-loadscope-reorder tests/e2e/untimed tests/contract tests/faults
	$(BIN)/python -m pytest tests/e2e --ignore tests/e2e/untimed

check: .venv/.installed-test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/unit/test_imports.py

# The page is written also when a row falls short: it says so then, and make fails.
faults: .venv/.installed-test
	TUNEWRIGHT_FAULTS=long TUNEWRIGHT_FAULTS_JSON=.venv/faults.jsonl $(BIN)/python -m pytest tests/faults; \
	status=$$?; $(BIN)/python tests/faults/document.py .venv/faults.jsonl docs && exit $$status

# Goes on where it was stopped; runs/benchmarks has the log. Peers that are not installed are left out, and told.
# Compiled code is kept between a system's runs: the first one on a machine takes half a minute longer.
bench: .venv/.installed-test
	$(BIN)/python -m benchmarks.run --caches warm

bench-advice: .venv/.installed-test
	$(BIN)/python -m benchmarks.advice
	$(BIN)/python -m benchmarks.choice
	$(BIN)/python -m benchmarks.limits
	$(BIN)/python -m benchmarks.advice_page

bench-peers: .venv-peers/.installed .venv-llamafactory/.installed

# Their versions are whole lists, so that nothing is resolved: LLaMA-Factory asks for builds that it does not use here.
.venv-%/.installed: benchmarks/environments/%.txt
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r $<
	touch $@

# Ours and TRL in one environment that has a torch built for the GPU, which `make setup` does not install.
GPU_PYTHON ?= $(BIN)/python
bench-gpu:
	$(GPU_PYTHON) -m benchmarks.run --device gpu --python $(GPU_PYTHON)

clean:
	rm -rf .venv runs
