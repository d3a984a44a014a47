# The front door. Everything it makes lies in build/ and demo/.
# make help lists the targets.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.ONESHELL:

VENV := build/venv
PYTHON := $(VENV)/bin/python
PROGRAM := build/release/arrowquant
WERROR := $(if $(CI),ON,OFF)
CONFIGURE = cmake --preset $(1) -DARROWQUANT_WERROR=$(WERROR) > build/$(1).configure.log 2>&1 || { cat build/$(1).configure.log; exit 1; }
FUZZ_SECONDS ?= 600

.PHONY: help demo build test test-c test-asan test-cli test-python wheel bench lint format fuzz deps install clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

demo: build $(VENV)/torch.done ## quantize the sample model at INT8, INT4 and INT2, plain and calibrated: a table and a picture
	@$(PYTHON) -m pip install --quiet .
	$(PYTHON) examples/demo.py --program $(PROGRAM) --model examples/dit-fashion --out demo

build: deps ## build the program: build/release/arrowquant
	@mkdir -p build
	$(call CONFIGURE,release)
	cmake --build --preset release

test: build ## everything: C unit tests, the same under ASan + UBSan, NEON, command line, Python
	@$(MAKE) --no-print-directory test-c test-asan test-cli test-python

test-c: build ## C unit tests (and NEON under qemu where its packages are)
	@ctest --preset release

test-asan: deps ## C unit tests under AddressSanitizer and UndefinedBehaviorSanitizer
	@mkdir -p build
	$(call CONFIGURE,asan)
	cmake --build --preset asan
	ctest --preset asan

test-cli: build $(VENV)/torch.done ## command line tests
	@ARROWQUANT_PROGRAM=$(CURDIR)/$(PROGRAM) $(PYTHON) -m pytest -q tests/integration

test-python: build $(VENV)/torch.done ## Python tests, on the package as pip installs it
	@$(PYTHON) -m pip install --quiet .
	ARROWQUANT_PROGRAM=$(CURDIR)/$(PROGRAM) $(PYTHON) -m pytest -q tests/python

bench: build $(VENV)/torch.done ## benchmarks: ratios to peers and to memory bandwidth
	@build/release/aq_bench quant
	@build/release/aq_bench gemm
	@build/release/aq_bench linear
	$(PYTHON) bench/whole_model.py --program $(PROGRAM)
	$(PYTHON) -m pip install --quiet .
	$(PYTHON) bench/bench_python.py
	$(PYTHON) bench/bench_recorder.py

wheel: build $(VENV)/python.done ## build an abi3 wheel into dist/ and test it in a fresh environment
	@ARROWQUANT_PROGRAM=$(CURDIR)/$(PROGRAM) scripts/build_wheel.sh $(PYTHON)

lint: deps $(VENV)/python.done ## formatters and static analysis
	@scripts/lint.sh $(VENV)

format: ## rewrite C and Python files in the project's format
	@git ls-files '*.c' '*.h' | xargs clang-format -i
	$(VENV)/bin/ruff format --quiet python tests examples bench scripts

fuzz: deps ## run each fuzz target for FUZZ_SECONDS (600)
	@mkdir -p build
	$(call CONFIGURE,fuzz)
	cmake --build --preset fuzz
	scripts/fuzz.sh $(FUZZ_SECONDS)

install: build ## install program, libraries and headers (PREFIX, default /usr/local)
	@cmake --install build/release --prefix $(or $(PREFIX),/usr/local)

deps: ## install the Debian packages that are missing
	@scripts/install_debian_packages.sh

$(VENV)/python.done: requirements-test.txt | deps
	@python3 -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --upgrade pip
	$(PYTHON) -m pip install --quiet -r requirements-test.txt
	touch $@

$(VENV)/torch.done: requirements-torch.txt $(VENV)/python.done
	@echo "installing torch and diffusers into $(VENV) (once)"
	$(PYTHON) -m pip install --quiet -r requirements-torch.txt
	touch $@

clean: ## remove everything that was made
	@rm -rf build demo dist
