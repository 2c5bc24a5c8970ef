# SPDX-License-Identifier: MIT
#
# The front door: every target calls CMake, pip or a script in tools/.  What they need is installed
# into .venv on first use (VENV=system: must be there already).  `make help` lists the targets.

PYTHON ?= python3
VENV ?=
TORCH_VERSION ?= 2.13.0
JOBS ?= $(shell nproc)
PREFIX ?= /usr/local
DIST ?= dist
CHECK ?=
Q ?=
ARGS ?=

# Scripts find the tools of .venv first.
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export PYTHON VENV TORCH_VERSION JOBS
PACKAGES := tools/venv.sh
BUILD := tools/build.sh

.PHONY: help demo demo-mla test test-gpu build check asan tsan bench bench-gpu wheel install dev lint fmt abi clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: dev ## search Python's documentation; make demo Q="how do I copy a file"
	@$(PACKAGES) demo
	@.venv/bin/python demo/search.py $(if $(Q),"$(Q)")

demo-mla: dev ## a small model of DeepSeek's shape over a paged latent cache (ARGS="--tokens 99")
	@$(PACKAGES) demo
	@.venv/bin/python demo/mla.py $(ARGS)

test: ## everything: C checks, sanitizers, Python, clients, demo, wheels, lint (STAGES="lint python")
	@$(PACKAGES) test
	@tools/test.sh

test-gpu: dev ## on a Hopper GPU: C checks, kernels' helpers, Python tests and clients
	@$(PACKAGES) test
	@$(BUILD) release attn_check
	@tools/test_gpu.sh

build: ## libattn.so and the binding, into build/release (CUDA=pip: nvcc's work by Python packages)
	@$(PACKAGES) build
	@$(BUILD) release

check: ## the C program: every kernel against the oracle (CHECK="--op mha_fwd --bench")
	@$(PACKAGES) build
	@$(BUILD) release attn_check
	build/release/attn_check $(CHECK)

asan: ## the C program under the address and undefined-behaviour sanitizers
	@$(PACKAGES) build
	@$(BUILD) asan attn_check
	build/asan/attn_check $(CHECK)

tsan: ## the C program under the thread sanitizer: one OpenMP thread, many callers
	@$(PACKAGES) build
	@$(BUILD) tsan attn_check
	OMP_NUM_THREADS=1 OMP_THREAD_LIMIT=1 build/tsan/attn_check $(CHECK)

bench: dev ## the figures, a row a shape (ARGS="--rows decode", MLA="sparse", KDA="--tokens 2048")
	@$(PACKAGES) demo
	@.venv/bin/python bench/cpu_mha_fwd.py $(ARGS)
	@.venv/bin/python bench/cpu_mla.py $(MLA)
	@.venv/bin/python bench/cpu_kda.py $(KDA)

bench-gpu: dev ## a Hopper GPU's figures (ARGS="--rows d128 --peer fa3=PATH", DECODE="--rows page", KDA="--d 64")
	@ATTN_LIB=build/release/libattn.so .venv/bin/python bench/gpu_mha_fwd.py $(ARGS)
	@ATTN_LIB=build/release/libattn.so .venv/bin/python bench/gpu_decode.py $(DECODE)
	@ATTN_LIB=build/release/libattn.so .venv/bin/python bench/gpu_kda.py $(KDA)

wheel: ## the wheels, into dist/ (CUDA=pip: for drivers of CUDA 12)
	@$(PACKAGES) build
	@$(BUILD) release
	@tools/wheels.sh $(DIST)

install: ## library, headers, CMake and pkg-config files, into PREFIX
	@$(PACKAGES) build
	@$(BUILD) release
	@.venv/bin/cmake --install build/release --prefix $(PREFIX)

dev: ## the Python packages, editable, into .venv
	@$(PACKAGES) build
	@tools/dev.sh

lint: ## formatting, ruff, warnings as errors (gcc, and clang where it is), SPDX lines
	@$(PACKAGES) test
	@tools/lint.sh

fmt: ## format C and Python in place
	@$(PACKAGES) test
	@git ls-files '*.c' '*.h' | xargs .venv/bin/clang-format -i
	@.venv/bin/ruff check -q --fix . ; .venv/bin/ruff format .

abi: build ## exported names against tools/abi.txt, and instruction sets against file names
	@.venv/bin/python tools/abi.py build/release
	@.venv/bin/python tools/isa.py build/release

clean: ## everything that was built; .venv stays
	rm -rf build dist .pytest_cache .hypothesis .ruff_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
