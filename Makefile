# Everything is built from a clean clone on Debian 12. The lab needs root; lint and unit do not, if their packages are installed.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

export PATH := $(CURDIR)/.venv/bin:$(PATH)
# Set in many images of Python. Every command would compile Ansible again, which takes longer than most of them.
unexport PYTHONDONTWRITEBYTECODE
PYTHON_OUTSIDE_APP := plugins playbooks roles molecule docs bench
PROGRAMS := $(wildcard roles/*/files/*.py molecule/*.py docs/*.py)

.PHONY: help root controller demo proof down test tools lint lint-python lint-ansible unit molecule chaos soak vm bench lock collection reference screenshot

help: ## List the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

controller: .venv/.installed ## Install Ansible and the command line into .venv; needs no root

demo: root .venv/.installed ## Create the lab, deploy to it, prove that it is sticky (first time 3 minutes, then 1)
	@$(call need,jq:jq)
	@$(call say,Creating the hosts of inventory/lab$(comma) and building what they install)
	@mkdir -p .artifacts
	@ansible-playbook playbooks/artifacts.yml > .artifacts/artifacts.log 2>&1 & building=$$!; \
	  trap 'kill $$building 2>/dev/null || :' EXIT; \
	  ansible-playbook molecule/shared/create.yml; \
	  wait $$building || { cat .artifacts/artifacts.log >&2; exit 1; }
	@$(call say,Deploying to them)
	ansible-playbook site.yml
	@$(MAKE) proof

proof:
	@$(call say,Real clients$(comma) each with an id: every session must stay on its node)
	stickyring probe "$(EDGE):9002" --ids 60 --connections 2
	@$(call say,The same clients without an id: their requests reach different nodes)
	stickyring probe "$(EDGE):9002" --ids 20 --connections 1 --no-key --json .artifacts/no-key.json || [ $$? = 1 ]
	@jq --exit-status '.transports.polling.invalid_session > 0' .artifacts/no-key.json >/dev/null || \
	  { echo "The negative control did not fail: without an id, polling must get Invalid session." >&2; exit 1; }
	@printf '%s\n' '' 'The lab is up. Open:' \
	  '  $(EDGE):9001/             one node, no user id (the single-node demo)' \
	  '  $(EDGE):9002/index2.html  all nodes, sticky by client_id' \
	  '  $(EDGE):9003/             all nodes, no user id: polling fails by design' \
	  '`make down` removes it.'

down: root .venv/.installed ## Remove the lab: hosts, network, keys and images
	ansible-playbook molecule/shared/destroy.yml -e stickyring_lab_purge=true
	@# The one that scenarios create beside it.
	ansible-playbook -i molecule/operations/inventory molecule/shared/destroy.yml -e stickyring_lab_purge=true

test: root lint unit molecule ## Lint, unit tests, and all scenarios with a browser (an hour; takes a running demo down)

lint: .venv/.tools ## Check style, types, playbooks and roles without running them
	@$(MAKE) --jobs=2 --output-sync=target lint-python lint-ansible

lint-python: .venv/.tools
	cd app && ruff check && ruff format --check && mypy
	ruff check --config app/pyproject.toml $(PYTHON_OUTSIDE_APP)
	ruff format --check --config app/pyproject.toml $(PYTHON_OUTSIDE_APP)
	MYPYPATH=app/tests mypy --config-file app/pyproject.toml bench
	MYPYPATH=molecule/shared/tests:app/tests mypy --config-file app/pyproject.toml $(PROGRAMS)
	MYPYPATH=collections mypy --config-file app/pyproject.toml --package ansible_collections.stickyring.fleet.plugins
	@# One by one, because folders of tests have modules of the same names.
	for tests in roles/*/tests playbooks/tests molecule/tests; do \
	  MYPYPATH=$$tests:collections mypy --config-file app/pyproject.toml $$tests; done

lint-ansible: .venv/.tools
	docs/reference.py --check
	docs/dashboards.py --check
	yamllint --strict .
	ansible-lint
	antsibull-changelog lint
	@# As other teams get it. It wants to fetch pip for environments of its own, which Python brings as well.
	@mkdir -p .artifacts/ansible-test/.ansible/test/cache
	@echo 'import ensurepip; ensurepip.bootstrap()' > .artifacts/ansible-test/.ansible/test/cache/get_pip_24_2.py
	folder=$$(mktemp -d); trap 'rm -r "$$folder"' EXIT; \
	  ansible-galaxy collection build --output-path $$folder >/dev/null; \
	  ansible-galaxy collection install --offline --force --collections-path $$folder $$folder/*.tar.gz >/dev/null 2>&1; \
	  cd $$folder/ansible_collections/stickyring/fleet; export HOME=$(CURDIR)/.artifacts/ansible-test; \
	  ansible-test sanity --python default --color no $(SANITY:%=--test %)

# All that needs no other version of Python, and looks at what ruff, mypy, yamllint and antsibull-changelog do not.
SANITY := action-plugin-docs empty-init ignores line-endings no-assert no-get-exception no-illegal-filenames \
	no-smart-quotes replace-urlopen runtime-metadata shebang symlinks use-argspec-type-path validate-modules

unit: .venv/.tools .venv/.prometheus ## Unit tests, without root and without the lab
	@# The package has the Redis server too, and unlike redis-server it starts none.
	@$(call need,redis-check-rdb:redis-tools node:nodejs)
	cd app && pytest $(SIDE_BY_SIDE)
	@# What has to hold for applications of both kinds, on the other worker class.
	cd app && STICKYRING_TEST_RUNTIME=asgi pytest $(SIDE_BY_SIDE) $(ON_BOTH)
	cd app && STICKYRING_TEST_RUNTIME=gevent pytest $(SIDE_BY_SIDE) $(ON_GEVENT)
	@# Separate, because importing Ansible's controller redirects the warnings of modules.
	pytest $(SIDE_BY_SIDE) playbooks
	pytest $(SIDE_BY_SIDE) roles molecule/tests bench

molecule: root .venv/.tools ## All scenarios on real hosts, with a browser
	@$(call need,chromium:chromium)
	molecule/scenarios.py

chaos: root .venv/.tools ## Run operations and faults on the lab, with a bus, in random order, under traffic (SEED=1 OPERATIONS=60)
	@$(call need,node:nodejs npm:npm)
	ansible-playbook molecule/shared/create.yml
	ansible-playbook site.yml
	molecule/chaos.py --seed $(SEED) --operations $(OPERATIONS)

soak: root .venv/.tools ## Everything that `make test` leaves out, chaos and PyPy, into docs/soak.md (3 hours; OPERATIONS=15 HOURS=1)
	@$(call need,chromium:chromium)
	molecule/soak.py --operations $(OPERATIONS) --hours $(HOURS)

vm: root .venv/.tools ## Take an edge and two nodes as real VMs (QEMU) through their life, into docs/vms.md (50 minutes; KEEP=1 leaves them)
	@$(call need,qemu-system-x86_64:qemu-system-x86 qemu-img:qemu-utils mmdebstrap:mmdebstrap mkfs.ext4:e2fsprogs)
	molecule/vm.py $(if $(KEEP),--keep)

bench: root .venv/.tools ## Measure this stack (PARTS='nodes edges' or one of bus, operations, faults; PROFILE=quick: 5 minutes; full: 40)
	@$(call need,node:nodejs npm:npm mmdebstrap:mmdebstrap redis-check-rdb:redis-tools)
	python -m bench $(PARTS) --profile $(PROFILE)

collection: .venv/.installed ## Build .artifacts/stickyring-fleet-VERSION.tar.gz, for `ansible-galaxy collection install` (INSTALL=FOLDER does it)
	ansible-galaxy collection build --force --output-path .artifacts
ifeq ($(origin INSTALL),command line)
	ansible-galaxy collection install --force --offline --collections-path $(INSTALL) \
	  .artifacts/stickyring-fleet-$(shell sed -n 's/^version: //p' galaxy.yml).tar.gz
endif

reference: .venv/.tools ## Write the reference tables and the example inventory from the roles' variables, and the dashboards
	docs/reference.py
	docs/dashboards.py

screenshot: .venv/.tools ## Take docs/demo.png of the running demo
	@$(call need,chromium:chromium jq:jq)
	docs/screenshot.py "$(EDGE):9002"

lock: .venv/.installed ## Lock the dependencies of an application together with the node's (PROJECT=../chat), or our own
# Only as an argument: somebody may have exported a variable of this name.
ifeq ($(origin PROJECT),command line)
	@# It may name stickyring, which is built from here and in no index.
	uv pip compile $(COMPILE) $(PROJECT)/pyproject.toml app/pyproject.toml --extra node --no-emit-package stickyring \
	  --override <(echo 'stickyring @ file://$(CURDIR)/app') --output-file $(PROJECT)/requirements.lock
else
	uv pip compile $(COMPILE) app/pyproject.toml --extra node --output-file app/requirements.lock
	uv pip compile $(COMPILE) requirements.in app/pyproject.toml --extra node --extra probe --extra plan --output-file requirements.lock
	uv pip compile $(COMPILE) requirements-test.in --constraint requirements.lock --output-file requirements-test.lock
endif

# More processes than a small machine has cores, because most tests wait for a process that they have started.
SIDE_BY_SIDE := --numprocesses 5 --dist worksteal --durations 10
ON_BOTH := tests/test_admin.py tests/test_bus.py tests/test_bus_recovery.py tests/test_delivery.py tests/test_echo.py \
  $(addprefix tests/node/test_,control.py drain.py limits.py metrics.py packets.py rebalance.py takeover.py websocket.py websocket_conformance.py worker.py)
# Not surge mode, running out of descriptors, and clients that leave in the middle of a request (README's table).
ON_GEVENT := tests/test_admin.py tests/test_bus.py tests/test_echo.py tests/test_delivery.py \
  $(addprefix tests/node/test_,control.py drain.py metrics.py rebalance.py websocket.py)
SEED = 1
OPERATIONS = $(if $(filter soak,$(MAKECMDGOALS)),15,60)
HOURS = 1
PARTS = nodes edges
PROFILE = quick

COMPILE := --project app --system-certs --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-annotate --no-header

.venv/.installed: requirements.lock app/pyproject.toml app/hatch_build.py app/package-lock.json
	@$(call need,python3:python3 npm:npm ssh:openssh-client ip:iproute2)
	@python3 -c 'import ensurepip' 2>/dev/null || $(call install, python3-venv)
	@$(call say,Installing the controller into .venv (a quarter of a minute))
	@python3 -m venv .venv
	@# Not compiled at installation, because most modules are never imported.
	@pip install --quiet --no-compile --require-hashes --requirement requirements.lock
	@pip install --quiet --no-deps --no-build-isolation --editable app
	@touch $@

tools: .venv/.tools ## Install molecule, pytest and the linters into .venv

.venv/.tools: .venv/.installed requirements-test.lock
	@$(call say,Installing the test tools (half a minute))
	@pip install --quiet --no-compile --require-hashes --requirement requirements-test.lock
	@touch $@

PROMETHEUS := roles/stickyring_monitor/tests/debian-packages.txt

# Unpacked, because the packages start servers. apt checks the hash of what it downloads.
.venv/.prometheus: .venv/.installed $(PROMETHEUS)
	@$(call say,Fetching Prometheus for the tests of its rules)
	@folder=$$(mktemp -d); trap 'rm -r "$$folder"' EXIT; cd "$$folder"; \
	  get() { apt-get download -qq $$(cat $(CURDIR)/$(PROMETHEUS)); }; \
	  get 2>/dev/null || { [ "$$(id -u)" != 0 ] || apt-get update -qq; get; }; \
	  for package in *.deb; do dpkg-deb --extract "$$package" .; done; \
	  install --target-directory=$(CURDIR)/.venv/bin usr/bin/prometheus usr/bin/promtool usr/bin/prometheus-blackbox-exporter
	@touch $@

# These targets must never touch the hosts of an exported ANSIBLE_INVENTORY.
demo proof down chaos screenshot: export ANSIBLE_INVENTORY := $(CURDIR)/inventory/lab

root:
	@[ "$$(id -u)" = 0 ] || { echo "Run this as root: it creates hosts and installs packages for them." >&2; exit 1; }

# need,COMMAND:PACKAGE ...: install the packages whose command is missing
need = missing=; for pair in $(1); do command -v "$${pair%%:*}" >/dev/null || missing+=" $${pair\#\#*:}"; done; \
	[ -z "$$missing" ] || $(call install,$$missing)
install = { [ "$$(id -u)" = 0 ] || { echo "Missing here; as root: apt-get install$(1)" >&2; exit 1; }; \
	echo "Installing$(1)"; apt-get update -qq && apt-get install -qq --no-install-recommends $(1) >/dev/null; }
say = echo; echo "==> $(1)"
comma := ,
EDGE = http://$(shell .venv/bin/ansible-inventory --inventory inventory/lab --list | jq --raw-output "._meta.hostvars[.edge.hosts[0]].ansible_host")
