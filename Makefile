# Every target does its own set-up: system packages (by apt-get, as root), a virtual environment from the lock file.
.DEFAULT_GOAL := help
SHELL := /bin/sh

PYTHON ?=
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
ENGINE := $(VENV)/.engine
GATEWAY ?= $(PY) -m fzg
ONLY ?=

LAB_PACKAGES := ip=iproute2 nft=nftables turnserver=coturn iperf3=iperf3 curl=curl openssl=openssl setpriv=util-linux
BINARY_PACKAGES := objdump=binutils strip=binutils
TEST_PACKAGES := $(LAB_PACKAGES) $(BINARY_PACKAGES) setcap=libcap2-bin ping=iputils-ping ss=iproute2 dnsmasq=dnsmasq-base \
	prometheus=prometheus promtool=prometheus sysctl=procps su=util-linux useradd=passwd git=git
PACKAGING_PACKAGES := dpkg-deb=dpkg shellcheck=shellcheck mandoc=mandoc systemd-analyze=systemd mmdebstrap=mmdebstrap
TEST_PACKAGES += $(PACKAGING_PACKAGES)

.PHONY: help demo test test-all soak lint bench binary release package installer docs screens lock clean
help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(ENGINE) ## the gateway at work in a laboratory of its own (GATEWAY=dist/firezone-gateway for the frozen file)
	@packaging/require $(LAB_PACKAGES) || echo "going on without them" >&2
	@$(PY) -m tests.lab demo --gateway "$(GATEWAY)"

test: $(ENGINE) ## all tests that fit into a quarter of an hour
	@packaging/require $(TEST_PACKAGES) $$($(PY) packaging/python_packages.py library) || echo "going on without them: tests that need them say so" >&2
	@$(PY) -m tests -m "not long"

test-all: $(ENGINE) ## all tests
	@packaging/require $(TEST_PACKAGES) $$($(PY) packaging/python_packages.py library) || echo "going on without them: tests that need them say so" >&2
	@$(PY) -m tests

soak: $(ENGINE) ## simulations and fuzzing with ever new seeds (MINUTES=10; SEED=n repeats one batch)
	@$(PY) -m tests.soak $(if $(MINUTES),--minutes $(MINUTES)) $(if $(SEED),--seed $(SEED)) $(if $(ONLY),--only "$(ONLY)")

lint: $(READY) ## ruff, mypy and the layers
	$(VENV)/bin/ruff check fzg tests packaging
	$(VENV)/bin/ruff format --check fzg tests packaging
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

bench: $(ENGINE) ## figures as a table and as build/bench.json (ONLY=tcp1,connect_ms for some)
	@packaging/require $(LAB_PACKAGES)
	@$(PY) -m tests.bench $(if $(ONLY),--only $(ONLY))
	@$(if $(ONLY),,$(PY) -m tests.bench.connect_times)
	@$(if $(ONLY),,$(PY) -m tests.bench.nat_matrix)
	@$(if $(ONLY),,$(PY) -m tests.bench.scale)

binary: $(READY) ## dist/firezone-gateway, one file, and dist/SHA256SUMS
	@library=$$($(PY) packaging/python_packages.py library) && packaging/require $(BINARY_PACKAGES) $$library
	@$(MAKE) --no-print-directory $(ENGINE) FZG_REQUIRE_NATIVE=1
	packaging/freeze $(PY)
	@cat dist/SHA256SUMS

docs: $(READY) ## write docs/settings.md anew from the code
	PYTHONPATH=. $(PY) packaging/settings_page.py

release: ## dist/release/firezone-gateway, the same for hosts with an older C library (as root, on Debian)
	@packaging/require mmdebstrap=mmdebstrap unshare=util-linux git=git
	packaging/release

package: $(if $(FILE),$(READY),binary) ## dist/firezone-gateway_VERSION_ARCHITECTURE.deb (FILE=dist/release/firezone-gateway for older hosts too)
	@packaging/require dpkg-deb=dpkg
	packaging/debian/build $(PY) $(or $(FILE),dist/firezone-gateway) dist
	@ls -l dist/*.deb

# The address is fixed at release time: nobody who runs the installer can change where the program comes from.
installer: $(READY) ## dist/install.sh for dist/SHA256SUMS (BASE_URL=https://… is where releases are downloaded from)
	@test -n "$(BASE_URL)" || { echo "say where releases are downloaded from: make installer BASE_URL=https://..." >&2; exit 2; }
	$(PY) packaging/make-installer $$($(PY) -c 'from fzg.version import VERSION; print(VERSION)') $(BASE_URL) $(or $(SUMS),dist/SHA256SUMS) >dist/install.sh.new
	mv dist/install.sh.new dist/install.sh

screens: $(ENGINE) ## docs/screen-*.svg anew, from real runs of status, doctor and the demo
	@packaging/require $(LAB_PACKAGES)
	@$(PY) -m tests.lab.screens

lock: ## write requirements.lock anew from pyproject.toml
	$(VENV)/bin/pip install -q pip-tools
	$(VENV)/bin/pip-compile -q --extra dev --extra build --generate-hashes --allow-unsafe --strip-extras \
		--no-emit-index-url --no-emit-find-links --no-emit-trusted-host --no-emit-options -o requirements.lock pyproject.toml

clean: ## remove what the other targets made
	rm -rf $(VENV) build dist .cache

$(READY): requirements.lock pyproject.toml
	@packaging/environment $(VENV) $(PYTHON)
	@touch $@

# Without a compiler the engine in Python does the work; FZG_REQUIRE_NATIVE=1 makes that an error.
$(ENGINE): $(READY) $(wildcard setup.py fzg/dataplane/_native.pyx fzg/dataplane/native/*)
	@packaging/require cc=gcc $$($(PY) packaging/python_packages.py headers) || echo "going on without a compiler" >&2
	@test ! -e setup.py || FZG_REQUIRE_NATIVE=$(FZG_REQUIRE_NATIVE) $(PY) setup.py -q build_ext --inplace
	@touch $@
