# Everything happens in .venv, made from Python ≥ 3.10 and a package index alone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUNS := runs/quickstart
DATA := data/quickstart

# The quick start shows the whole path on two CPU ranks, whatever the machine has besides.
RANKS := DS_ACCELERATOR=cpu $(BIN)/deepspeed --quiet --num_gpus 2

.PHONY: quickstart test test-long bench gpu lint

quickstart: $(VENV)/.test
	@$(BIN)/python launch/shards.py build mnist5k $(DATA)/mnist/train --split train
	@$(BIN)/python launch/shards.py build mnist5k $(DATA)/mnist/val --split val
	@$(BIN)/python launch/shards.py build digits $(DATA)/digits/train --split train
	@$(BIN)/python launch/shards.py build digits $(DATA)/digits/test --split test
	@echo; echo "== Pre-train on MNIST, 20 px"
	@$(RANKS) launch/pretrain.py --config quickstart/pretrain.json --out $(RUNS)/pretrain
	@echo; echo "== Fine-tune on digits, 30 px"
	@$(RANKS) launch/finetune.py --config quickstart/finetune.json --init $(RUNS)/pretrain --out $(RUNS)/finetune
	@echo; echo "== Few-shot on digits: frozen features, linear probes"
	@$(RANKS) launch/fewshot.py --config quickstart/fewshot.json --init $(RUNS)/pretrain --out $(RUNS)/fewshot
	@echo; echo "fine-tuned: $$(grep eval/top1 $(RUNS)/finetune/metrics.jsonl | tail -n 1)"
	@echo "few-shot report: $(RUNS)/fewshot/report/report.md"

test: lint
	@$(BIN)/python -m pytest -q --durations=10

test-long: $(VENV)/.test
	@$(BIN)/python -m pytest -q -m long

bench: $(VENV)/.bench
	@$(BIN)/python benchmarks/loader.py
	@$(BIN)/python benchmarks/stream.py
	@$(BIN)/python benchmarks/gains.py
	@for arch in ti s b l; do $(BIN)/python benchmarks/step.py --arch vit_$${arch}_16 || exit; done
	@$(BIN)/python benchmarks/step.py --arch vit_h_14 --rounds 1
	@for arch in ti s b; do $(BIN)/python benchmarks/step.py --arch vit_$${arch}_16 --compiled || exit; done
	@$(BIN)/python benchmarks/loop.py
	@$(BIN)/python benchmarks/stages.py
	@$(BIN)/python benchmarks/planned.py
	@$(BIN)/python benchmarks/memory.py --quick
	@$(BIN)/python benchmarks/saving.py
	@$(BIN)/python benchmarks/probes.py --draws 4
	@$(BIN)/python benchmarks/kills.py

# On a machine with a CUDA device, whose python may already hold torch and DeepSpeed.
gpu:
	@$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) benchmarks/gpu.py

lint: $(VENV)/.test
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

$(VENV)/.test: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed, this is " + sys.version)'
	@command -v $${CXX:-c++} >/dev/null || { echo "a C++ compiler is needed (DeepSpeed builds its CPU ops): apt-get install g++"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV): about 6 GB, some minutes …"
	@$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

$(VENV)/.bench: $(VENV)/.test
	@$(BIN)/python -m pip install --quiet --editable '.[bench]'
	@touch $@
