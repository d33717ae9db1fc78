# make demo: everything from nothing to the demo. make test: the tests. Needs Python 3.11 or newer and make.
# Without an NVIDIA GPU torch comes without CUDA, from PyTorch's index of CPU builds if that can be reached.
# The first Python that runs and is new enough; `make PYTHON=...` overrides.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done || echo python3)
VENV := .venv
BIN := $(VENV)/bin
NATIVE := $(wildcard $(addprefix src/foretell/backbone/cpu/native/,* */*))
PYTEST := $(BIN)/python -m pytest -n auto --dist worksteal

# Every test runs the best build of the kernels that the processor has, and some run each of them. These run the best one
# only, so `make builds` runs them once more with each lower build in its place. Rules and trees multiply nothing.
LOWER := from foretell.backbone.cpu.library import BUILDS, find; print(*[name for name in BUILDS if find(name)][1:])
BUILDS ?=
CASES ?= 0
EXACT := $(patsubst %,tests/test_%.py,engine engine_faults native cache breadth medusa hydra kangaroo \
  layerskip swift replay hidden_transfer m2r2 hamburger fused)

.PHONY: help venv demo test fast builds check docs clean

help:
	@echo "make demo   set up, fetch the demo model, answer a question plain and with speculation"
	@echo "make test   every test, the real model included      make fast   a case of each quick one"
	@echo "make builds the exactness tests with each lower build of the kernels as the best one"
	@echo "make check  ruff and types, generated docs up to date  make docs   regenerate them"

$(VENV)/done: pyproject.toml setup.py constraints.txt tools/cpu_index.py $(NATIVE)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "foretell needs Python 3.11 or newer; $(PYTHON) is older. Try: make PYTHON=/path/to/python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check $$($(PYTHON) tools/cpu_index.py) \
	  -c constraints.txt -e ".[dev]"
	touch $@

venv: $(VENV)/done

demo: venv
	$(BIN)/foretell demo

test: venv
	$(PYTEST)

fast: venv
	$(PYTEST) -m "not real and not slow" --cases 1

builds: venv
	lower=$$($(BIN)/python -c "$(LOWER)") || exit 1; for build in $(or $(BUILDS),$$lower); do \
	  case " $$lower " in *" $$build "*) ;; *) continue;; esac; \
	  echo "FORETELL_KERNELS=$$build"; \
	  FORETELL_KERNELS=$$build $(PYTEST) -m "not real" --cases $(CASES) $(EXACT) || exit 1; done

check: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tools/cli_help.py --check
	$(BIN)/python tools/readme.py --check

docs: venv
	$(BIN)/python tools/cli_help.py
	$(BIN)/python tools/readme.py

clean:
	rm -rf $(VENV) build src/foretell/backbone/cpu/_kernels.so
