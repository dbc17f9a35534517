# Everything needs only Python 3.11+, make and a network; all that is made lies in .host/.
PYTHON ?= python3
RUN := .host/venv/bin/python
PYTEST := $(RUN) -m pytest -n 2 --dist loadfile

# Bytecode lies in .host/pycache: nothing is written into COMFYUI_PATH, and later starts are twice as quick.
export PYTHONPYCACHEPREFIX := $(CURDIR)/.host/pycache
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup demo test test-all lint aot bench bench-gpu node-assets matrix attention-quality cache-quality fidelity serve clean

setup:
	@$(PYTHON) bootstrap/setup.py

demo: setup
	@$(RUN) bootstrap/demo.py

test: lint
	$(PYTEST)

test-all: lint
	TESSERA_PAIRS=all $(PYTEST)

lint: setup
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

aot: setup
	$(RUN) bench/aot.py --all --jobs 2

bench: setup
	@$(RUN) bench

bench-gpu: setup
	@$(RUN) bench --gpu

node-assets: setup
	$(RUN) bootstrap/node_assets.py

matrix: setup
	$(RUN) bootstrap/attention_matrix.py
	$(RUN) bootstrap/model_matrix.py

attention-quality: setup
	$(RUN) bootstrap/attention_quality.py

cache-quality: setup
	$(RUN) bootstrap/cache_quality.py

fidelity: setup
	$(RUN) bootstrap/fidelity.py

serve: setup
	@$(RUN) bootstrap/serve.py

clean:
	rm -rf .host .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
