# `make` lists the targets. Each does its own set-up, in .venv; results go to output/.
#   PYTHON=/path/to/python3   the interpreter to make .venv with (default: the first Python >= 3.10 on the PATH)
#   VENV=folder               another place for the environment
#   SETUP=no                  use the environment that is active, as it is (conda, a container)
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help demo demo-hydra demo-seeds test test-fast test-slow test-latest gpu mutants docs check style clean

PYTHON ?=
VENV ?= .venv
PYTEST_ARGS ?=
SEED ?= 0
SEEDS ?= 0 1 2
JOBS ?= 1

ifneq ($(SETUP),no)
ENVIRONMENT := $(abspath $(VENV))
READY := $(ENVIRONMENT)/.ready
export PATH := $(ENVIRONMENT)/bin:$(PATH)
# DeepSpeed's compiled operators, apart from those of other environments, which would be compiled anew in turn.
export TORCH_EXTENSIONS_DIR ?= $(ENVIRONMENT)/torch_extensions
# Made again when these files change, and when the folder was moved or its Python removed.
$(READY): setup.py pyproject.toml constraints.txt
	@PYTHON=$(PYTHON) .ci/setup $(ENVIRONMENT)
ifneq ($(shell test "$$(cat $(READY) 2>&1)" = $(ENVIRONMENT) && $(ENVIRONMENT)/bin/python -c '' 2>&1 && echo intact),intact)
.PHONY: $(READY)
endif
endif

help: ## this list
	@grep -E '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | awk -F ':.*## ' '{printf "make %-11s %s\n", $$1, $$2}'

demo: $(READY) ## the three stages on the built-in corpus, minutes without a GPU; results in output/demo
	rm -rf output/demo
	python -m remax.demo.prepare --output_dir output/demo --seed $(SEED)
	for step in step*/; do \
		printf '\n===== %s =====\n\n' "$$(tr _ ' ' <<<"$${step%/}")"; \
		bash $${step}training_scripts/demo/run_demo.sh --seed $(SEED); \
	done
	printf '\n===== report =====\n'
	python -m remax.demo.report --output_dir output/demo --seed $(SEED)

demo-hydra: $(READY) ## the same with one model: steps 1 and 2 at once, ReMax by adapters on it; results in output/demo_hydra
	rm -rf output/demo_hydra
	python -m remax.demo.prepare --output_dir output/demo_hydra --seed $(SEED)
	printf '\n===== steps 1 and 2 at once =====\n\n'
	MODEL=output/demo_hydra/models/actor DATA=output/demo_hydra/data OUTPUT=output/demo_hydra/hydra_sft \
		bash step2*/training_scripts/demo/run_demo.sh --seed $(SEED) --loss hydra --data_split 0,8,2 \
		--learning_rate 3e-3 --weight_decay 0 --logging_steps 50
	printf '\n===== step 3 on the same model =====\n\n'
	MODEL=output/demo_hydra/hydra_sft REWARD_MODEL= DATA=output/demo_hydra/data OUTPUT=output/demo_hydra/remax \
		bash step3*/training_scripts/demo/run_demo.sh --seed $(SEED) --share all \
		--actor_lora_dim 16 --only_optimize_lora --actor_lora_learning_rate 5e-3 \
		--reference_zero_stage 0 --reward_zero_stage 0 --disable_reward_dropout false
	printf '\n===== report =====\n'
	python -m remax.demo.report --output_dir output/demo_hydra --seed $(SEED)

demo-seeds: $(READY) ## make demo with each of several seeds (SEEDS="0 1 2"), and how much its figures vary
	for seed in $(SEEDS); do $(MAKE) demo SEED=$$seed; cp output/demo/summary.json output/demo_seed_$$seed.json; done
	python -m remax.demo.seeds $(SEEDS:%=output/demo_seed_%.json)

test: $(READY) ## every test (PYTEST_ARGS="-k scripts" for some)
	python -m pytest $(PYTEST_ARGS)

test-fast: $(READY) ## the quick tests: they start no further processes; under three minutes
	python -m pytest -m "not ranks and not compiled" $(PYTEST_ARGS)

test-slow: $(READY) ## what takes too long for every day: forty random kills, every recorded training stopped; 20 minutes
	mkdir -p output
	KILL_REPORT=$(abspath output/kills.md) python -m pytest -m slow $(PYTEST_ARGS)

gpu: $(READY) ## what a machine with GPUs can show: tests, demo, what a step costs; writes docs/results/gpu.md
	python benchmarks/gpu.py

test-latest: ## the quick tests with the newest releases of all but torch, in .venv-latest (LATEST="transformers": beyond setup.py)
	PYTHON=$(PYTHON) PYTEST_ARGS="$(PYTEST_ARGS)" .ci/latest $(abspath $(VENV)-latest) $(LATEST)

mutants: $(READY) ## hand-made faults, each of which some test must notice: half an hour (JOBS=2: two at a time)
	python tests/mutants/run.py --jobs $(JOBS)

docs: $(READY) ## the documents as a site with a gallery: build/site/index.html; each link is followed
	python -c 'import material' 2>/dev/null || python -m pip install --disable-pip-version-check --quiet \
		--no-build-isolation -c constraints.txt -e '.[docs]'
	python docs/build_site.py

check: $(READY) ## lint, types, import direction, shell scripts
	ruff check .
	mypy
	shellcheck .ci/* utils/*.sh step*/*/*.sh step*/*/*/*.sh benchmarks/*/*.sh
	python -m pytest tests/test_layout.py -q -k imports

style: $(READY) ## format and fix the Python files
	ruff check --fix .
	ruff format .

clean: ## remove .venv, .venv-latest and caches (results in output/ stay)
	rm -rf $(VENV) $(VENV)-latest build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
