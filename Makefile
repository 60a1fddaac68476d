# Two commands on a fresh machine: `make demo` (the main job) and `make test` (everything that must hold).
# Both make a virtual environment in .venv and install what they need into it.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
COUNT ?= 2000

.PHONY: demo test check lint types layers unit bench proofs costs cache-peers pretrained steering fuzz format peers browser clean

demo: $(VENV)/demo.done
	$(BIN)/glocal compare --report report.html
	@echo "The report is in report.html: open it in a browser."

test: check unit

check: lint types layers

lint: $(VENV)/test.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/test.done
	$(BIN)/mypy

layers: $(VENV)/test.done
	$(BIN)/lint-imports

unit: $(VENV)/test.done browser
	$(BIN)/python -m pytest

format: $(VENV)/test.done
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/test.done
	$(BIN)/python benchmarks/cpu_kernels.py

# What the papers claim, in small: a line with a figure and a verdict for each system, and a table in docs/proofs.md.
proofs: $(VENV)/test.done
	$(BIN)/python benchmarks/run_proofs.py $(ONLY)

# Time and memory of every mechanism against full attention, from 1,024 to 32,768 tokens: docs/costs.md.
costs: $(VENV)/test.done
	$(BIN)/python benchmarks/cost_curves.py --write

# KV-cache policies at an equal budget, kvpress' beside ours, in an environment of its own: kvpress needs transformers below 5.3.
cache-peers: $(VENV)/cache-peers/done
	$(VENV)/cache-peers/bin/python benchmarks/cache_peers.py $(if $(MODEL),--model $(MODEL))

# Everything in docs/pretrained.md, on a quiet machine.
pretrained: $(VENV)/test.done $(VENV)/cache-peers/done
	$(BIN)/python benchmarks/pretrained.py --peers-python $(VENV)/cache-peers/bin/python $(ONLY)

# The table in docs/steering.md: every way of steering the shipped vision-language model, on one core.
steering: $(VENV)/test.done
	$(BIN)/python benchmarks/steering.py

# The native kernels under AddressSanitizer and UndefinedBehaviorSanitizer, on COUNT random problems.
fuzz: $(VENV)/test.done
	$(MAKE) -C tests/sanitize COUNT=$(COUNT)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/demo.done: $(VENV)/bin/python pyproject.toml constraints.txt CMakeLists.txt $(wildcard src/glocal/kernels/native/*.[ch]*)
	@# The tests' editable install has all that the demo needs; another one over it would hide the built kernels from them.
	[ -e $(VENV)/test.done ] || $(PIP) install -q -c constraints.txt torch
	[ -e $(VENV)/test.done ] || $(PIP) install -q -c constraints.txt '.[demo]'
	touch $@

$(VENV)/test.done: $(VENV)/bin/python pyproject.toml constraints.txt CMakeLists.txt $(wildcard src/glocal/kernels/native/*.[ch]*)
	$(PIP) install -q -c constraints.txt torch setuptools wheel
	$(PIP) install -q -c constraints.txt -e '.[test]'
	$(PIP) install -q --no-build-isolation --no-deps natten==0.21.7 || echo "natten cannot be installed here; its conformance tests will be skipped"
	$(MAKE) --no-print-directory peers
	touch $@

# Libraries that only tests compare with, in a folder that is on no path: tests/peers.py imports from it.
peers: $(VENV)/bin/python
	$(PIP) install -q --upgrade --no-deps -c constraints.txt --target $(VENV)/peers timm torchvision==0.28.0 fla-core kvpress \
	  || echo "timm, flash-linear-attention and kvpress cannot be installed here; tests that compare with them will be skipped"
	$(PIP) install -q --upgrade --no-deps -c constraints.txt --target $(VENV)/peers agent-attention-pytorch \
	  linear-attention-transformer axial-positional-embedding linformer taylor-series-linear-attention rotary-embedding-torch \
	  gaussian-adaptive-attention multimatch-gaze torch_geometric \
	  || echo "the ports of single papers cannot be installed here; tests that compare with them will be skipped"

$(VENV)/cache-peers/done: pyproject.toml constraints.txt CMakeLists.txt $(wildcard src/glocal/kernels/native/*.[ch]*)
	$(PYTHON) -m venv $(VENV)/cache-peers
	$(VENV)/cache-peers/bin/python -m pip --disable-pip-version-check install -q -c constraints.txt torch
	$(VENV)/cache-peers/bin/python -m pip --disable-pip-version-check install -q kvpress==0.5.5 transformers==5.2.0 -e '.[hf]'
	touch $@

# The report is read back in a real browser; where none can be installed, that test says so and is skipped.
browser:
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null \
	  || { command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ] \
	       && apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium chromium-driver >/dev/null; } \
	  || echo "no chromium and no way to install it; the browser test will be skipped"

clean:
	rm -rf $(VENV) build dist report.html
