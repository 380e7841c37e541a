# Everything runs in a virtual environment of its own; set VENV= to use another, PYTHON= to choose the interpreter.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO ?= demo-out
STUDY ?= study-out

MAKEFLAGS += --no-print-directory

# What the native library is made of. Installing compiles it; after a change, the next target that installs does again.
NATIVE := CMakeLists.txt native/inplace/CMakeLists.txt $(wildcard native/*.cpp native/*.h native/*.map) lnsdeploy/kernels/stages.h
JOBS ?= $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
# pip brings a CMake of its own and takes it away again; where the system has none, `native` and `sanitize` install one.
CMAKE ?= $(or $(shell command -v cmake),$(BIN)/cmake)

SANITIZE ?= address,undefined
# Kernels of AVX-512 are tested on machines without it too: there, their instructions are emulated.
EMULATE_AVX512 ?= $(if $(shell grep -m 1 -o avx512vbmi /proc/cpuinfo 2>/dev/null),OFF,ON)
# The equality suite on the library, and the GPU kernels' text on the host: every kernel by addresses, those that differ in
# how threads meet by races as well.
SANITIZE_TESTS ?= tests/conformance tests/test_native.py tests/test_cuda.py -k "(test_cuda and (every_kernel or convolutions)) or \
  ((cpu or kernel or named or saturation or cancel or strides or sums or encode or steps or random_bytes) and not torch and not cuda)"
SANITIZE_THREADS ?= tests/test_cuda.py -k "every_kernel and (saturate or bins or pair or log-low)"
FUZZED ?= 10000
NO_ASLR ?= $(if $(shell setarch -R true 2>/dev/null && echo yes),setarch -R)
# An interpreter with the wheel to be tested, lnsdeploy[all], pytest and hypothesis; by default one is made.
SMOKE_PYTHON ?= build/smoke/bin/python

.PHONY: help install native system demo study test lint format wheel smoke sanitize sanitized sanitized-suite sanitized-models \
  sanitized-threads clean

help:  ## Show the targets.
	@grep -E '^[a-z]+:.*##' Makefile | sed 's/:.*## /\t/'

install: $(VENV)/.installed  ## Install lnsdeploy with everything it can use.
	@# a second make, which sees what the first has just installed
	@$(MAKE) $(VENV)/.native

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@ $(VENV)/.native

$(VENV)/.native: $(NATIVE)
	@$(MAKE) native
	touch $@

native: $(CMAKE)  ## Rebuild the native library in the source tree, after a change of its C++.
	$(CMAKE) -S native/inplace -B build/native
	$(CMAKE) --build build/native --parallel $(JOBS)

$(BIN)/cmake:
	$(BIN)/pip install --quiet --disable-pip-version-check cmake

# Of use, but not needed: what cannot be installed is left out, and the tests that want it say so.
system:  ## Install Debian's packages of system-packages.txt, as root.
	@for name in $$(grep -v '^#' system-packages.txt); do \
	  dpkg -s $$name >/dev/null 2>&1 || missing="$$missing $$name"; done; \
	test -z "$$missing" || { apt-get update -q && DEBIAN_FRONTEND=noninteractive \
	  apt-get install -q -y --no-install-recommends $$missing; } || echo "not installed:$$missing"

demo: install  ## Train, export, emulate, verify and report on real digits; ends with a table.
	$(BIN)/python examples/demo.py --out $(DEMO)

# With MNIST=DIR, where its four files lie, on its CNN as well; stopped by whatever, the same command goes on.
study: install  ## Search datapaths for the CNNs of digits and MNIST (MNIST=DIR), beside int8, int4 and fp8.
	$(BIN)/lnsdeploy study examples/studies/$(if $(MNIST),digits-mnist,digits).toml --workers $(JOBS) --out $(STUDY) $(if $(MNIST),--data-dir $(MNIST))

LIBRARY = $$($(BIN)/python -c 'from lnsdeploy import _native; print(_native.library_path() or "none")')

test: install  ## Lint, type checks and all tests, the native library's once more under sanitizers.
	@# without a compiler there is no library to test; types take one core, so the sanitized one is built beside
	$(MAKE) --jobs 2 --output-sync=target lint $$(test ! -e "$(LIBRARY)" || echo sanitize)
	$(BIN)/pytest -n 2 --dist loadgroup
	test ! -e "$(LIBRARY)" || $(MAKE) sanitized

lint: install  ## Format check, lint and type checks.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: install  ## Format the sources.
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

wheel:  ## Build a wheel for this platform into dist/.
	@mkdir -p build
	test -x build/wheel/bin/pip || $(PYTHON) -m venv build/wheel
	LNSDEPLOY_NATIVE=require build/wheel/bin/pip wheel --quiet --disable-pip-version-check --no-deps -w dist .
	@ls -t dist/*.whl | head -n 1

build/smoke/.installed: $(NATIVE) pyproject.toml constraints.txt $(shell find lnsdeploy -name '*.py')
	$(MAKE) wheel
	rm -rf build/smoke
	$(PYTHON) -m venv build/smoke
	wheel=$$(ls -t dist/*.whl | head -n 1) && build/smoke/bin/pip install --quiet --disable-pip-version-check \
	  -c constraints.txt "$$wheel[all]" pytest hypothesis
	touch $@

# From a folder that holds nothing but the tests: what they import is what is installed.
smoke: $(if $(filter build/smoke/%,$(SMOKE_PYTHON)),build/smoke/.installed)  ## Test an installed wheel, without the source tree; SMOKE_PYTHON= names its interpreter.
	@folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && cp -r pyproject.toml tests "$$folder" && \
	python=$(abspath $(SMOKE_PYTHON)) && unset PYTHONPATH && tests=$$(grep -rl --include='*.py' 'mark\.smoke' tests) && \
	cd "$$folder" && \
	"$$python" -c 'import lnsdeploy, lnsdeploy._native as n, pathlib, sys; \
	  home = pathlib.Path(lnsdeploy.__file__).resolve().parent.parent; print(home, n.library_path()); \
	  sys.exit("that is the source tree" if home == pathlib.Path(sys.argv[1]).resolve() else 0)' '$(CURDIR)' && \
	"$$python" -m pytest -q -m smoke -p no:cacheprovider $$tests

sanitize: $(CMAKE)  ## Build the native library with sanitizers into build/sanitize/.
	$(CMAKE) -S . -B build/sanitize -DLNS_SANITIZE=$(SANITIZE) -DLNS_EMULATE_AVX512=$(EMULATE_AVX512)
	$(CMAKE) --build build/sanitize --parallel $(JOBS)

# Python is not sanitized, so the runtime must come first; libstdc++ with it, or exceptions are not intercepted.
ADDRESSES = LNSDEPLOY_LIBRARY=$(CURDIR)/build/sanitize/liblnsdeploy.so ASAN_OPTIONS=detect_leaks=0 \
  LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libstdc++.so)"

sanitized: sanitize  ## Run the equality suite and malformed models on the sanitized library.
	$(MAKE) sanitized-suite
	@# the threads' part is one process
	$(MAKE) --jobs 2 --output-sync=target sanitized-threads sanitized-models

sanitized-suite:
	LNSDEPLOY_CONFORMANCE='cpu-*' LNSDEPLOY_CUDA_HOST_SANITIZE=address,undefined $(ADDRESSES) \
	  $(BIN)/python -m pytest -q -n 2 $(SANITIZE_TESTS)

sanitized-models:
	$(ADDRESSES) $(BIN)/python tests/fuzz_ort.py --unlimited --count $(FUZZED)

# Addresses are not randomised: what this sanitizer maps would be in the way.
sanitized-threads:
	LNSDEPLOY_CUDA_HOST_SANITIZE=thread TSAN_OPTIONS=halt_on_error=1:suppressions=$(CURDIR)/tests/cuda_host/tsan.supp \
	  LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libtsan.so)" $(NO_ASLR) \
	  $(BIN)/python -m pytest -q -p no:xdist $(SANITIZE_THREADS)

clean:  ## Remove what the other targets made.
	rm -rf $(VENV) $(DEMO) $(STUDY) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	rm -f lnsdeploy/_native/*.so lnsdeploy/_native/*.dylib lnsdeploy/_native/*.dll lnsdeploy/_native/build.json
	find native/inplace -mindepth 1 ! -path native/inplace/CMakeLists.txt -delete
