PYTHON ?= python3
BIN = .venv/bin

# a model that learns to tell clusters apart within three minutes on two CPU cores
DEMO = -type Swarm -n_hidden 32 -n_iter 10 -tasks 6000 -bs 20 -lr 0.01 -wc 3

.PHONY: demo data test test-cuda check lint bench bench-quick bench-precision gpu clean

demo: .venv/installed
	$(BIN)/python -u amortised_clustering.py $(DEMO) -overwrite

# all image sets, with torchvision's checksums, into data/: once, where there is a network
data: .venv/installed
	$(BIN)/python -c "from common.datasets import images; \
	    [images.load(name, split, download=True) for name in images.PUBLISHED for split in images.SPLITS]"

# by files in three processes of one thread each, as those of SLURM mostly wait
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile

# all scripts on a simulated GPU
test-cuda: .venv/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/cuda -n 2 --dist worksteal

# the fast half, for whoever changes a line
check: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# all benchmarks into results/benchmarks/PROCESSOR.json, and the table of machines there: about 22 minutes on two cores
bench: .venv/installed
	$(BIN)/python -m benchmarks

# less of each: 5 minutes
bench-quick: .venv/installed
	$(BIN)/python -m benchmarks --quick

# accuracy in fp32 and bf16 after the same epochs, into the same file: about 25 minutes
bench-precision: .venv/installed
	$(BIN)/python -m benchmarks.precision --save

# on a machine with a GPU, into results/gpu/CARD.json and the table of cards there: 10 minutes (docs/gpu.md)
gpu: .venv/installed
	$(BIN)/python -m benchmarks.gpu

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -r requirements.txt
	touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	$(BIN)/python -m pip install -q -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv .pytest_cache .ruff_cache .mypy_cache
