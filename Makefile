# Each target sets up what it needs, from nothing: Python >= 3.10 with venv, make and a C++ compiler.

PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= model,train,dev
# Where pip looks for torch, and for torch alone. Empty: the CPU build where nvidia-smi is missing
# (PyPI's build when that index cannot be reached), PyPI's build elsewhere.
TORCH_INDEX_URL ?=
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu

VIDEO ?= videodistill/assets/sample.mp4
FIGURE ?= answer.png
QUESTIONS ?= "what shape is the thing that makes the blue star shrink?" \
  "what shape is the purple visitor?" "on which side is the blue ring when it comes in?"
# Where `make gpu` writes, and which of its parts it does, all when empty: build tests bench head
# large sanitize more.
OUT ?= gpu
PART ?=
# One worker per core; each runs torch on one thread, so that they do not fight for cores.
PYTEST_FLAGS ?= -n auto --maxprocesses 8 --dist worksteal

PIP = $(VENV)/bin/python -m pip --disable-pip-version-check
INSTALLED = $(VENV)/.installed
# The oldest Triton that kernels must compile with, in a folder of its own.
OLDEST_TRITON = $(VENV)/triton-3.6.0
BUILD_INPUTS = pyproject.toml setup.py constraints.txt vd_kernels/_version.py $(shell find csrc -type f)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help answer test lint sanitize cross bench gpu default-model study clean

help: ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "Each target installs what it needs into $(VENV). Settings: PYTHON=python3.12 chooses the"
	@echo "interpreter, TORCH_INDEX_URL=https://download.pytorch.org/whl/cu130 where pip finds torch,"
	@echo "VD_BUILD_CPP=0|1, VD_BUILD_CUDA=0|1 (after make clean) whether C++ or CUDA is left out, or"
	@echo "must be built."

answer: $(INSTALLED) ## answer questions about the sample video; VIDEO=, QUESTIONS=, FIGURE= to change
	$(VENV)/bin/videodistill answer "$(VIDEO)" $(QUESTIONS) --figure "$(FIGURE)"

test: $(INSTALLED) $(OLDEST_TRITON) ## run the tests; PYTEST_FLAGS="-x -k gate" to choose
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest $(PYTEST_FLAGS)

lint: $(INSTALLED) ## check style and format
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

sanitize: $(INSTALLED) ## run the C++ kernels' tests under sanitizers: address, undefined, thread
	.ci/sanitize address $(PYTEST_FLAGS)
	.ci/sanitize thread $(PYTEST_FLAGS)

cross: $(VENV)/.torch ## compile the C++ for aarch64 and with Clang; CROSS=, CLANG= name the compilers
	.ci/cross

bench: $(VENV)/.bench ## measure and write the tables; BENCH_FLAGS="-q -k gate" to choose
	$(VENV)/bin/python -m benchmarks run $(BENCH_FLAGS)
	$(VENV)/bin/python -m benchmarks report

gpu: ## on a machine with a GPU: build, test and measure with PYTHON's packages; OUT=, PART= (see .ci/gpu)
	$(PYTHON) .ci/gpu $(OUT) $(PART)

default-model: $(INSTALLED) ## make the bundled model again: videos, encoder, features, head
	$(VENV)/bin/videodistill train-default

study: $(INSTALLED) ## compare VideoDistill with its controls, in hours; a stopped run goes on
	$(VENV)/bin/videodistill study

clean: ## remove what was built and cached; the packages in .venv stay
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	rm -f vd_kernels/_C.*.so vd_kernels/_cpu.*.so vd_kernels/_cuda.*.so vd_kernels/_build_info.json $(INSTALLED)
	find vd_kernels videodistill benchmarks tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "$(PYTHON) is older than Python 3.10; choose another: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

# torch comes alone, so that its index serves nothing else; the next step brings what it needs.
$(VENV)/.torch: $(VENV)/.created constraints.txt
	$(PIP) install -q -c constraints.txt setuptools ninja pybind11
	@install="$(PIP) install -q --no-deps -c constraints.txt torch"; \
	if [ -n "$(TORCH_INDEX_URL)" ]; then \
	  echo "torch from $(TORCH_INDEX_URL)"; $$install --index-url "$(TORCH_INDEX_URL)"; \
	elif [ "$$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null; then \
	  echo "torch for CPUs from $(TORCH_CPU_INDEX) (no nvidia-smi on this machine)"; \
	  $$install --index-url $(TORCH_CPU_INDEX) --retries 1 || \
	    { echo "not reached; torch from pip's own index"; $$install; }; \
	else \
	  echo "torch from pip's own index"; $$install; \
	fi
	@touch $@

$(INSTALLED): $(VENV)/.torch $(BUILD_INPUTS)
	$(PIP) install -q --no-build-isolation -c constraints.txt -e ".[$(EXTRAS)]"
	@$(VENV)/bin/python -m vd_kernels
	@touch $@

# Without it (another system or Python, no network) its tests are skipped.
$(OLDEST_TRITON): $(VENV)/.created
	@rm -rf $@.part
	$(PIP) install -q --retries 1 --no-deps --target $@.part triton==3.6.0 && mv $@.part $@ || \
	  echo "no Triton 3.6.0 for this machine: its tests will be skipped" >&2

$(VENV)/.bench: $(INSTALLED)
	$(PIP) install -q --no-build-isolation -c constraints.txt -e ".[$(EXTRAS),bench]"
	@touch $@
