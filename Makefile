# Every target does its own set-up: system packages (by apt-get, as root), a virtual environment from the lock file.
.DEFAULT_GOAL := help
SHELL := /bin/sh

PYTHON ?=
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
GATEWAY ?= $(PY) -m fzg
ONLY ?=
PYTEST := $(PY) -m pytest

LAB_PACKAGES := ip=iproute2 nft=nftables turnserver=coturn iperf3=iperf3 curl=curl openssl=openssl setpriv=util-linux
BINARY_PACKAGES := objdump=binutils strip=binutils
TEST_PACKAGES := $(LAB_PACKAGES) $(BINARY_PACKAGES) setcap=libcap2-bin ping=iputils-ping ss=iproute2 dnsmasq=dnsmasq-base

.PHONY: help demo test test-all soak lint bench binary lock clean
help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(READY) ## the gateway at work in a laboratory of its own (GATEWAY=dist/firezone-gateway for the frozen file)
	@packaging/require $(LAB_PACKAGES) || echo "going on without them" >&2
	@$(PY) -m tests.lab demo --gateway "$(GATEWAY)"

test: $(READY) ## all tests that fit into a quarter of an hour
	@packaging/require $(TEST_PACKAGES) $$($(PY) packaging/shared_python.py) || echo "going on without them: tests that need them say so" >&2
	$(PYTEST) -m "not long"

test-all: $(READY) ## all tests
	@packaging/require $(TEST_PACKAGES) $$($(PY) packaging/shared_python.py) || echo "going on without them: tests that need them say so" >&2
	$(PYTEST)

lint: $(READY) ## ruff, mypy and the layers
	$(VENV)/bin/ruff check fzg tests packaging
	$(VENV)/bin/ruff format --check fzg tests packaging
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

bench: $(READY) ## figures as a table and as build/bench.json (ONLY=tcp1,connect_ms for some)
	@packaging/require $(LAB_PACKAGES)
	@$(PY) -m tests.bench $(if $(ONLY),--only $(ONLY))

binary: $(READY) ## dist/firezone-gateway, one file
	@library=$$($(PY) packaging/shared_python.py) && packaging/require $(BINARY_PACKAGES) $$library
	packaging/freeze $(PY)
	@ls -l dist/firezone-gateway

lock: ## write requirements.lock anew from pyproject.toml
	$(VENV)/bin/pip install -q pip-tools
	$(VENV)/bin/pip-compile -q --extra dev --extra build --generate-hashes --allow-unsafe --strip-extras \
		--no-emit-index-url --no-emit-find-links --no-emit-trusted-host --no-emit-options -o requirements.lock pyproject.toml

clean: ## remove what the other targets made
	rm -rf $(VENV) build dist .cache

$(READY): requirements.lock pyproject.toml
	@packaging/environment $(VENV) $(PYTHON)
	@touch $@
