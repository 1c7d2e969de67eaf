# Two commands set everything up on a fresh machine: `make quickstart` and `make test`.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart test test-slow browser style precommit bench gpu-check clean

# Installed again whenever the dependencies change.
.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

# Pre-train a small model on real image-text pairs (OpenMoji), caption held-out images, write runs/quickstart/report.html.
quickstart: .venv/.installed
	PATH="$(CURDIR)/$(BIN):$$PATH" sh recipes/quickstart/run.sh

# Two worker processes of one thread each (tests/conftest.py sets the threads).
test: .venv/.installed browser
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

test-slow: .venv/.installed browser
	$(BIN)/python -m pytest -m slow

# The pages are tested in a real browser. Debian's is installed where that needs no password; else these tests skip.
browser:
	@command -v chromium chromium-browser google-chrome > /dev/null || [ "$$(id -u)" != 0 ] || \
		timeout 600 sh -c "apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium" > /dev/null || true

style: .venv/.installed
	$(BIN)/ruff format --check . && $(BIN)/ruff check .

precommit: .venv/.installed
	$(BIN)/ruff format . && $(BIN)/ruff check --fix .

# Each script prints its table and rewrites its file in benchmarks/results/.
bench: .venv/.installed
	$(BIN)/python benchmarks/packing.py
	$(BIN)/python benchmarks/train_step.py
	$(BIN)/python benchmarks/loading.py
	$(BIN)/python benchmarks/decoding.py
	$(BIN)/python benchmarks/sft.py
	$(BIN)/python benchmarks/generate.py
	$(BIN)/python benchmarks/data_scoring.py
	$(BIN)/python benchmarks/mlm_filter.py
	$(BIN)/python benchmarks/filter.py
	$(BIN)/python benchmarks/decontamination.py
	$(BIN)/python benchmarks/curation.py
	$(BIN)/python benchmarks/evaluate.py

# Ten minutes on a GPU: right or wrong, waits, the step, each lever; writes benchmarks/results/gpu.md and goes on from there.
# With packages of your own: PYTHONPATH=benchmarks python -m gpu_check
gpu-check: .venv/.installed
	PYTHONPATH=benchmarks $(BIN)/python -m gpu_check

clean:
	rm -rf runs build dist .pytest_cache .ruff_cache .hypothesis
