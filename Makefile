# make demo    on this machine's CPU: set-up, then a real agent trace on SGLang as it is and with DualPath
# make test    every test, the end-to-end ones on a real cluster included
# make lint    format, lint and types (under a minute)
# make test-slow    tests with a cluster of their own: DP attention, keys, weight updates (five minutes)
# make bench-load    the load paths on shaped links against upstream (root, 24 GiB of memory, about half an hour)
# make bench-scheduler    requests a second, plan latency and memory of the scheduler (two minutes)
# make sim-paper    the paper's results beside simulated ones (about 15 minutes of one core)
# make setup   only the virtual environment, the patches and the tiny model
PYTHON ?= python3.11
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
TORCH := torch==2.13.0+cpu
TORCH_INDEX := https://download.pytorch.org/whl/cpu

.PHONY: setup demo lint test test-slow bench-load bench-scheduler sim-paper clean
.DELETE_ON_ERROR:

setup: $(VENV)/.patched $(VENV)/.model $(VENV)/.bytecode

demo: setup
	$(VENV)/bin/dualpath demo

lint: $(VENV)/.lint
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/ruff check
	$(VENV)/bin/mypy

test: setup
	$(PY) -m pytest

test-slow: setup
	$(PY) -m pytest -m slow

bench-load: setup
	$(VENV)/bin/dualpath bench-load

bench-scheduler: setup
	$(PY) -m dualpath_sgl.evals.scheduler.bench

sim-paper: setup
	$(VENV)/bin/dualpath sim paper

clean:
	rm -rf $(VENV) .cache build dist *.egg-info

$(VENV)/.system: launch/setup/system_check.py
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found: install Python 3.11 (apt-get install python3.11" \
	  "python3.11-venv) or name one: make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m dualpath_sgl.launch.setup.system_check --install
	$(PYTHON) -m venv $(VENV)
	@touch $@

# PyPI's torch is the CUDA build; only the local version +cpu names the CPU one.  A wheel that
# pip is configured to find (find-links, a mirror) is preferred to PyTorch's own index.
$(VENV)/.torch: $(VENV)/.system
	@echo "== $(TORCH)"
	$(PIP) install --no-deps -q '$(TORCH)' 2>$(VENV)/torch.log || \
	  $(PIP) install --no-deps --index-url $(TORCH_INDEX) '$(TORCH)' || { cat $(VENV)/torch.log; exit 1; }
	@touch $@

$(VENV)/.packages: requirements/cpu.txt $(VENV)/.torch
	@echo "== $$(grep -c == requirements/cpu.txt) pinned packages (about two minutes)"
	$(PIP) install --no-deps --no-compile -r requirements/cpu.txt
	@touch $@

$(VENV)/.installed: pyproject.toml dualpath_sgl/cpu_profile/install.py $(VENV)/.packages
	@echo "== this project, editable"
	$(PIP) install -q --no-deps --no-build-isolation -e .
	$(PY) -m dualpath_sgl.cpu_profile.install
	@touch $@

$(VENV)/.lint: requirements/lint.txt $(VENV)/.installed
	$(PIP) install -q --no-deps -r requirements/lint.txt
	@touch $@

$(VENV)/.patched: $(wildcard patches/*/*.patch) launch/setup/patching.py $(VENV)/.installed
	@echo "== patches"
	$(VENV)/bin/dualpath patch apply
	@touch $@

# Every engine is three processes that import thousands of modules; without bytecode (Docker images
# often set PYTHONDONTWRITEBYTECODE) each of them would compile every source again: 18 s instead of 9.
$(VENV)/.bytecode: $(VENV)/.patched
	@echo "== bytecode (half a minute)"
	$(PY) -m compileall -q -j 0 -x '/(torch|tests?)/' $(VENV)/lib/python3*/site-packages
	@touch $@

$(VENV)/.model: launch/setup/tiny_model.py $(VENV)/.installed
	@echo "== tiny model"
	$(PY) -m dualpath_sgl.launch.setup.tiny_model
	@touch $@
