# make demo    on this machine's CPU: set-up, then a real agent trace on SGLang as it is and with DualPath
# make test    every test, the end-to-end ones on a real cluster included
# make lint    format, lint and types (under a minute)
# make test-slow    tests with a cluster of their own, with Prometheus, and the steps of the Dockerfiles (ten minutes)
# make test-models  tokens of every kind of model through a relay, beside one server's (ten minutes)
# make bench-load    loads through every path on shaped links against upstream (root, 16 GiB of memory, about 40 minutes)
# make clients    standard clients (bench_serving, AIPerf, OpenAI, Anthropic) through both routers (ten minutes)
# make eval-report    modes beside each other on shaped links, as an HTML page (root, half an hour; goes on where it stopped)
# make bench-scheduler    requests a second, plan latency and memory of the scheduler (two minutes)
# make sim-paper    the paper's results beside simulated ones (about 15 minutes of one core)
# make docs    docs/configuration.md and the README's picture, made anew
# make setup   only the virtual environment, the patches and the tiny model
# make requirements    requirements/*.txt again, with uv (requirements/README.md)
PYTHON ?= python3.11
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
TORCH_INDEX := https://download.pytorch.org/whl/cpu
UV ?= uv
PIN = $(UV) pip compile --quiet --generate-hashes --annotation-style line --no-python-downloads \
  --python-platform x86_64-manylinux_2_34 --custom-compile-command 'make requirements' $(UPGRADE)
LINT_TOOLS = $(PYTHON) -c "import tomllib; print(*tomllib.load(open('pyproject.toml', \
  'rb'))['project']['optional-dependencies']['lint'], sep='\n')"

.PHONY: setup demo lint test test-slow test-models clients bench-load eval-report bench-scheduler sim-paper docs \
  requirements clean
.DELETE_ON_ERROR:

setup: $(VENV)/.patched $(VENV)/.model $(VENV)/.bytecode

demo: setup
	$(VENV)/bin/dualpath demo

lint: $(VENV)/.lint
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/ruff check
	$(VENV)/bin/mypy
	$(VENV)/bin/hadolint Dockerfile Dockerfile.cuda

test: setup
	$(PY) -m pytest

test-slow: setup .cache/prometheus/.unpacked
	$(PY) -m pytest -m slow

test-models: setup
	$(PY) -m dualpath_sgl.evals.models

clients: setup
	$(VENV)/bin/dualpath eval clients

bench-load: setup
	$(VENV)/bin/dualpath bench-load

eval-report: setup
	$(VENV)/bin/dualpath eval matrix evals/matrix/experiments/cpu-report.yaml

bench-scheduler: setup
	$(PY) -m dualpath_sgl.evals.scheduler.bench

sim-paper: setup
	$(VENV)/bin/dualpath sim paper

# Versions in the files are kept where they fit: make requirements UPGRADE=--upgrade takes the newest.
# SGLang's image has Python 3.12; its wheels ask for glibc 2.34.
requirements:
	@command -v $(UV) >/dev/null || { echo "$(UV) not found: pip install uv, or name it: make requirements UV=FILE"; exit 1; }
	$(PIN) --python-version 3.11 --config-file requirements/uv.toml --no-emit-package torch \
	  pyproject.toml --extra test requirements/cpu.in -o requirements/cpu.txt
	$(PIN) --python-version 3.11 --no-config pyproject.toml --extra test --extra cuda -o requirements/cuda.txt
	$(PIN) --python-version 3.12 --config-file requirements/uv.toml \
	  pyproject.toml --extra cuda -c requirements/cuda.txt -o requirements/image.txt
	$(PIN) --python-version 3.11 --no-config requirements/clients.in -o requirements/clients.txt
	$(LINT_TOOLS) | $(PIN) --python-version 3.11 --no-config -c requirements/cpu.txt -o requirements/lint.txt -

docs: setup
	$(PY) -m dualpath_sgl.cli.configuration_page docs/configuration.md
	$(PY) -m dualpath_sgl.evals.load.gain docs/images/gain.json docs/images/gain.png

clean:
	rm -rf $(VENV) .cache build dist *.egg-info

$(VENV)/.system: launch/setup/system_check.py
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found: install Python 3.11 (apt-get install python3.11" \
	  "python3.11-venv) or name one: make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) launch/setup/system_check.py --install
	$(PYTHON) -m venv $(VENV)
	@touch $@

# A wheel that pip is configured to find (find-links, a mirror) is preferred to PyTorch's own index.
$(VENV)/.torch: requirements/torch-cpu.txt $(VENV)/.system
	@echo "== $$(grep -o '^torch==[^ ]*' $<)"
	$(PIP) install --no-deps --require-hashes -q -r $< 2>$(VENV)/torch.log || \
	  $(PIP) install --no-deps --require-hashes --index-url $(TORCH_INDEX) -r $< || { cat $(VENV)/torch.log; exit 1; }
	@touch $@

$(VENV)/.packages: requirements/cpu.txt $(VENV)/.torch
	@echo "== $$(grep -c == $<) pinned packages (about two minutes)"
	$(PIP) install --no-deps --no-compile --require-hashes -r $<
	@touch $@

$(VENV)/.installed: pyproject.toml dualpath_sgl/cpu_profile/install.py $(VENV)/.packages
	@echo "== this project, editable"
	$(PIP) install -q --no-deps --no-build-isolation -e .
	$(PY) -m dualpath_sgl.cpu_profile.install
	@touch $@

$(VENV)/.lint: requirements/lint.txt $(VENV)/.installed
	$(PIP) install -q --no-deps --require-hashes -r $<
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

# Debian's binaries for a test, unpacked and not installed: no daemon starts.
.cache/prometheus/.unpacked:
	@echo "== Prometheus"
	@mkdir -p $(@D)
	@if [ "$$(id -u)" = 0 ]; then apt-get update -qq; fi
	cd $(@D) && apt-get download -qq prometheus prometheus-alertmanager && \
	  for package in *.deb; do dpkg-deb -x $$package . || exit 1; done
	@touch $@

$(VENV)/.model: launch/setup/tiny_model.py $(VENV)/.installed
	@echo "== tiny model"
	$(PY) -m dualpath_sgl.launch.setup.tiny_model
	@touch $@
