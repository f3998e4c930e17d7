# Runlane. `make run` and `make test` set everything up on a machine with Python 3.11 and make.

PYTHON ?= python3
VENV ?= .venv
# More than cores: half of the time a test waits for a server.
JOBS ?= 3
BIN := $(VENV)/bin
READY := $(VENV)/.ready
RUN_READY := $(VENV)/.run-ready
# All but the extra `chat`, which is as large as the others together.
RUN_EXTRAS := cli,server,postgres,metrics,traces,jwt,uvloop,web,a2a
EXTRAS := $(RUN_EXTRAS),chat,acp,pytest
LISTEN ?= 127.0.0.1:50051
# A free port, so that the console is in nobody's way; HTTP=8080 fixes it.
HTTP ?= 127.0.0.1:0
AGENT ?= echo
SEEDS ?= 2000
START ?= 0
PROTO_VENV := .cache/proto-venv
PROTO_READY := $(PROTO_VENV)/.ready
BUILD_VENV := .cache/build-venv
BUILD_READY := $(BUILD_VENV)/.ready
SITE_VENV := .cache/site-venv
SITE_READY := $(SITE_VENV)/.ready
# The versions of the site, one folder each.
SITES ?= dist/sites
PROTOS := $(wildcard proto/runlane/v1/*.proto proto/runlane/worker/v1/*.proto proto/runlane/harness/v1/*.proto)
GENERATED := client/runlane/v1 client/runlane/worker/v1 client/runlane/harness/v1
# The oldest plugins whose code the Go module supports; they set the lower bounds in gen/go/go.mod.
GO_PLUGINS := .cache/go-plugins
GO_READY := $(GO_PLUGINS)/.ready-1.36.11-1.5.1
# An API server of Kubernetes, at the version of tests/deploy/kubernetes/go.mod, and Helm.
KUBE := .cache/kubernetes
KUBE_VERSION := $(lastword $(shell grep '^require k8s.io/kubernetes' tests/deploy/kubernetes/go.mod))
KUBE_READY := $(KUBE)/.ready-$(KUBE_VERSION)
HELM_VERSION := v3.22.0
GO_MODULE := $(word 2,$(shell head -n 1 gen/go/go.mod))

# The real agents of `make test-agents`, at the versions that docs/acp.md names.
AGENTS ?= codex-acp gemini-cli opencode qwen-code
AGENT_codex-acp := @zed-industries/codex-acp@0.16.0
AGENT_gemini-cli := @google/gemini-cli@0.61.0
AGENT_opencode := opencode-ai@1.18.33
AGENT_qwen-code := @qwen-code/qwen-code@0.15.10

PACKAGES := dist/packages
CARGO := CARGO_TARGET_DIR=$(CURDIR)/.cache/cargo cargo

# Tests that take minutes: they search and simulate interleavings, kill servers and databases, make disks
# fail, plant faults in the code, damage the rows of a store, start several servers or nodes, and walk the
# pages of the docs.
PROOFS := \
	tests/a2a/test_races.py \
	tests/a2a/test_strangers.py \
	tests/agents/test_form_checks.py \
	tests/bench \
	tests/client/test_cli_trouble.py \
	tests/client/test_mcp_stdio.py \
	tests/cluster/test_workers.py \
	tests/core/test_lane_search.py \
	tests/core/test_mutants.py \
	tests/deploy/test_compose.py \
	tests/deploy/test_kubernetes.py \
	tests/deploy/test_systemd.py \
	tests/e2e/test_acp.py \
	tests/e2e/test_agent_code.py \
	tests/e2e/test_agent_processes.py \
	tests/e2e/test_chat.py \
	tests/e2e/test_histories.py \
	tests/e2e/test_operate.py \
	tests/e2e/test_pages.py \
	tests/e2e/test_processes.py \
	tests/e2e/test_relay.py \
	tests/e2e/test_removal_kills.py \
	tests/e2e/test_webhooks.py \
	tests/e2e/test_worker_restart.py \
	tests/engine/test_input_nodes.py \
	tests/engine/test_nodes.py \
	tests/engine/test_outage.py \
	tests/engine/test_recovery.py \
	tests/engine/test_store_away.py \
	tests/process/test_http_door.py \
	tests/process/test_security.py \
	tests/proofs/attack \
	tests/proofs/conformance \
	tests/proofs/crash \
	tests/proofs/fuzz \
	tests/proofs/lanecheck \
	tests/proofs/nodes \
	tests/proofs/sim/test_live_nodes.py \
	tests/proofs/sim \
	tests/proofs/webhooks \
	tests/rpc/test_access_mutants.py \
	tests/store/postgres/test_failover.py \
	tests/store/postgres/test_faults.py \
	tests/store/postgres/test_planted_rows.py \
	tests/store/sqlite/test_names.py \
	tests/store/sqlite/test_planted_rows.py \
	tests/telemetry/test_scrape.py \
	tests/testing/test_pytest_plugin.py \
	tests/web/test_console.py \
	tests/web/test_console_text.py \
	tests/webhooks/test_delivery.py \
	tests/webhooks/test_nodes.py \
	tests/webhooks/test_shares.py

# Other versions of Python that are installed here.
PYTHONS ?= $(sort $(wildcard $(HOME)/.pyenv/versions/3.1[2-9].*/bin/python /usr/bin/python3.1[2-9]))

# The exceptions start a server process or PostgreSQL.
FAST := $(addprefix tests/,access config core engine feed net project rpc) $(addprefix --ignore=,$(PROOFS)) \
	--ignore=tests/access/test_quota_file.py -k 'not postgresql'

# The tests start hundreds of servers. Without a cache each would compile all modules again.
export PYTHONPYCACHEPREFIX := $(CURDIR)/.cache/pycache
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: a2a-races help run test test-fast test-proofs test-postgres test-polyglot test-pythons test-lowest test-agents build packages test-packages test-image test-kubernetes test-monitoring release provenance sbom bench bench-peers check-lane sim crash nodes answers rolling soak restarts webhooks fuzz attack pictures image-requirements check lint types check-proto check-docs proto docs format audit licenses constraints site clean

help: ## List the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

run: ## Start a server on LISTEN (127.0.0.1:50051), with a console on HTTP, a SQLite file and AGENT (echo)
	@$(check_address)
	@$(MAKE) --no-print-directory -q $(READY) 2>/dev/null || $(MAKE) --no-print-directory $(RUN_READY)
	$(BIN)/runlane-server --listen $(LISTEN) --http $(HTTP) --store sqlite:///runlane.db --agent "$(AGENT)"

test: $(READY) ## Run the standard tests; those below take longer or need more
	$(BIN)/pytest -n $(JOBS) --dist worksteal $(or $(TESTS),$(addprefix --ignore=,$(PROOFS)))

test-fast: $(READY) ## Run the tests that need no server process, in less than a minute
	$(BIN)/pytest -n $(JOBS) --dist worksteal $(or $(TESTS),$(FAST))

test-proofs: $(READY) ## Run the long tests: kills, failing disks, conformance, fuzzing
	$(BIN)/pytest -n $(JOBS) --dist worksteal $(or $(TESTS),$(filter-out %/attack,$(PROOFS)))

test-postgres: $(READY) ## Run all tests that use a store over PostgreSQL; REST=1 leaves out those of the other targets
	$(BIN)/pytest -n $(JOBS) --dist worksteal --store postgresql $(if $(REST),--not-usual) $(TESTS)

test-polyglot: $(READY) ## Test quickstarts, workers and conformance clients in all languages, and the first-steps pages
	RUNLANE_POLYGLOT=1 $(BIN)/pytest -n $(or $(PROGRAMS),4) --dist worksteal $(or $(TESTS),tests/polyglot)

test-pythons: ## Run the tests of test-fast with each interpreter of PYTHONS
	$(if $(PYTHONS),,$(error PYTHONS: no Python from 3.12 on was found; name some))
	for python in $(PYTHONS); do \
		venv=.cache/python-$$($$python -c 'import sys; print("%d.%d" % sys.version_info[:2])') && $$python -m venv $$venv \
		&& $$venv/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]' \
		&& $$venv/bin/pytest -n $(JOBS) --dist worksteal $(FAST) || exit 1; \
	done

test-lowest: ## Run the tests of test-fast with the lowest versions of all dependencies
	rm -rf .cache/lowest && $(PYTHON) -m venv .cache/lowest
	.cache/lowest/bin/pip install --quiet --disable-pip-version-check uv
	.cache/lowest/bin/uv pip install --quiet --python .cache/lowest --resolution lowest-direct --editable '.[$(EXTRAS)]'
	.cache/lowest/bin/uv pip install --quiet --python .cache/lowest pytest-asyncio pytest-timeout pytest-xdist hypothesis httpx2 PyYAML
	.cache/lowest/bin/pytest -n $(JOBS) --dist worksteal $(filter-out tests/project,$(FAST))

test-agents: $(READY) $(AGENTS:%=.cache/agents/%/.ready) ## Run real ACP agents against models of the tests; AGENTS names some
	if unshare --net --map-root-user true 2>/dev/null; then \
		isolated="unshare --net --map-root-user sh $(CURDIR)/tests/agents/acp/loopback.sh"; export RUNLANE_NO_NETWORK=1; \
	fi; RUNLANE_AGENTS=.cache/agents $$isolated $(BIN)/pytest -rs tests/agents/acp/test_real_agents.py

pictures: $(READY) ## Make the pictures of the console in docs/, with the chromium of the system
	RUNLANE_PICTURES=docs $(BIN)/pytest tests/web/test_console.py -k pictures

check-lane: $(READY) ## Search all interleavings of commands on a lane of RUNS runs, DEPTH commands deep
	cd tests && ../$(BIN)/python -m proofs.sim.explore --depth $(or $(DEPTH),22) --runs $(or $(RUNS),3) --reservations 2

sim: $(READY) ## Simulate SEEDS worlds from START on: cancels, crashes, stale lanes; on a virtual clock
	cd tests && ../$(BIN)/python -m proofs.sim.run --seeds $(SEEDS) --start $(START)
	cd tests && ../$(BIN)/python -m proofs.sim.run --seeds $$(($(SEEDS) / 4)) --start $(START) --nodes 2
	cd tests && ../$(BIN)/python -m proofs.sim.run --seeds $$(($(SEEDS) / 4)) --start $(START) --nodes 3

crash: $(READY) ## Kill a server under load, ROUNDS times; SEED repeats a failing round
	cd tests && ../$(BIN)/python -m proofs.crash.run --rounds $(or $(ROUNDS),20) $(if $(SEED),--seed $(SEED))

nodes: $(READY) ## Kill, stop and cut off three nodes over PostgreSQL, and WORKERS (3), for MINUTES; SEED and FIRST repeat a round
	cd tests && ../$(BIN)/python -m proofs.crash.nodes_run --minutes $(or $(MINUTES),2) --workers $(or $(WORKERS),3) $(if $(SEED),--seed $(SEED)) $(if $(FIRST),--first $(FIRST) --rounds 1)

# Four of five instants kill the server.
answers: $(READY) ## Answer, cancel, expire and kill in the same instant, for ROUNDS (1000) questions over STORE (sqlite); SEED repeats them
	cd tests && ../$(BIN)/python -m proofs.crash.answers --rounds $(or $(ROUNDS),1000) --store $(or $(STORE),sqlite) $(if $(SEED),--seed $(SEED))

soak: $(READY) ## Open and cancel thousands of streams and runs; fail if the server grows
	cd tests && ../$(BIN)/python -m proofs.crash.soak

restarts: $(READY) ## Restart server and gateway under streams over HTTP, RESTARTS (1000) times each
	RUNLANE_RESTARTS=$(or $(RESTARTS),1000) $(BIN)/pytest --show-capture=no tests/web/test_streams.py -k r25

a2a-races: $(READY) ## Send and cancel RACES (1000) tasks at once over A2A
	RUNLANE_A2A_RACES=$(or $(RACES),1000) $(BIN)/pytest --show-capture=no -o timeout=900 tests/a2a/test_races.py

webhooks: $(READY) ## Kill a server that delivers to webhooks, KILLS (200) times; then measure its deliveries
	RUNLANE_KILLS=$(or $(KILLS),200) $(BIN)/pytest -rA --show-capture=no tests/proofs/webhooks

fuzz: $(READY) ## Fuzz all parsers, and agents, for SECONDS; SEED repeats the inputs, ONLY names a target
	cd tests && ../$(BIN)/python -m proofs.fuzz.run --seconds $(or $(SECONDS),300) $(if $(SEED),--seed $(SEED)) $(if $(ONLY),--only $(ONLY))

# One at a time, since it measures latencies. -rA prints the figures.
rolling: $(READY) ## Restart servers while workers execute RUNS runs: three nodes over PostgreSQL ROUNDS times, one over SQLite ten times
	cd tests && ../$(BIN)/python -m proofs.crash.rolling --store postgresql --runs $(or $(RUNS),300) --rounds $(or $(ROUNDS),3)
	cd tests && ../$(BIN)/python -m proofs.crash.rolling --store sqlite --runs $(or $(RUNS),300) --rounds 10

attack: $(READY) ## Attack servers, and measure what a quiet tenant notices; ONLY names an attack
	$(BIN)/pytest -rA --show-capture=stdout --log-level=CRITICAL tests/proofs/attack $(if $(ONLY),-k $(ONLY))

build: $(BUILD_READY) ## Build wheel and sdist into dist/, and run the wheel in a clean environment
	rm -rf dist
	$(BUILD_VENV)/bin/python -m build --outdir dist .
	$(BUILD_VENV)/bin/twine check --strict dist/*
	$(PYTHON) tests/deploy/distribution.py dist

packages: $(BUILD_READY) ## Build the packages of all languages into dist/packages
	rm -rf $(PACKAGES) && mkdir -p $(PACKAGES)
	$(BUILD_VENV)/bin/python -m build --wheel --outdir $(PACKAGES) .
	cp -R gen/go $(PACKAGES)/go
	cp LICENSE gen/ts && cp LICENSE gen/rust
	cd gen/ts && rm -rf dist && npm install --no-fund --no-audit --no-package-lock && npm run build \
		&& npm pack --pack-destination ../../$(PACKAGES)
	cd gen/java && mvn --quiet --batch-mode clean deploy -DaltDeploymentRepository=packages::file://$(CURDIR)/$(PACKAGES)/maven
	cd gen/rust && $(CARGO) run --quiet --manifest-path generate/Cargo.toml -- ../../proto src/generated \
		&& $(CARGO) package --quiet --allow-dirty --no-verify
	cp .cache/cargo/package/*.crate $(PACKAGES)

test-packages: $(READY) packages ## Build a program with each package, outside the repository, and run it
	$(BIN)/python tests/packages/run.py $(PACKAGES)

test-image: $(READY) ## Run the steps of the Dockerfile, and the server they make; with buildah, build the image and run it
	$(BIN)/pytest -p no:cacheprovider tests/deploy/image_steps.py tests/deploy/image_build.py

test-monitoring: $(READY) ## Scrape a server over PostgreSQL with a real Prometheus, and ask it what dashboard and alerts ask
	$(BIN)/pytest -rAs --show-capture=stdout tests/deploy/monitoring.py

test-kubernetes: $(READY) $(KUBE_READY) ## Give manifests and Helm chart to a real API server; building it takes 20 minutes, once
	PATH="$(CURDIR)/$(KUBE):$$PATH" $(BIN)/pytest tests/deploy/test_helm.py tests/deploy/api_server.py

release: $(READY) ## Prepare the release VERSION: versions, changelog, packages, checksums; MODULE and GROUP name the publisher
	$(BIN)/python gen/release.py "$(VERSION)" $(if $(MODULE),--module $(MODULE)) $(if $(GROUP),--group $(GROUP))
	$(MAKE) proto docs packages sbom
	cd $(PACKAGES) && find . -type f ! -name SHA256SUMS | sort | xargs sha256sum > SHA256SUMS

provenance: ## Write the provenance of the packages of a tagged release, to be signed (docs/releasing.md)
	$(PYTHON) gen/provenance.py $(PACKAGES)

# Of what the image installs: the exact versions and hashes.
sbom: $(BUILD_READY) ## Write the bill of materials of the server, as CycloneDX, into dist/packages
	mkdir -p $(PACKAGES)
	$(BUILD_VENV)/bin/cyclonedx-py requirements deploy/requirements.txt --pyproject pyproject.toml \
		--output-reproducible --validate --output-file $(PACKAGES)/runlane-server.cdx.json

bench: $(READY) ## Measure the performance against bare gRPC; BENCH="--quick" is a short form
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[bench]'
	cd tests && $(abspath $(BIN))/python -m bench.run $(BENCH)

bench-peers: $(READY) ## Measure other services that do the same work; needs npm, and Go for the load
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[bench-peers]'
	npm install --silent --no-save --ignore-scripts --prefix .cache/bench/peers @restatedev/restate-server
	cd tests && $(abspath $(BIN))/python -m bench.run --only a2a --only dbos --only restate $(BENCH)

check: lint types check-proto check-docs site ## Run the linters, the type checkers and the freshness checks, and build the site

lint: $(READY) ## Lint code and proto
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	cd proto && ../$(BIN)/buf lint && ../$(BIN)/buf format --diff --exit-code
	$(breaking)

types: $(READY) ## Check the types
	$(BIN)/mypy
	$(BIN)/pyright --pythonpath $(BIN)/python

check-proto: $(PROTO_READY) $(GO_READY) ## Check that the generated code is fresh
	rm -rf .cache/proto && mkdir -p .cache/proto/go
	$(call generate,.cache/proto)
	$(call generate_go,.cache/proto/go)
	diff -r .cache/proto/go/runlane gen/go/runlane
	for part in $(GENERATED:client/%=%); do \
		diff -r -x __init__.py -x __pycache__ .cache/proto/$$part client/$$part || exit 1; \
	done

check-docs: $(READY) ## Check that the generated parts of the docs, and the synchronous client, are fresh
	$(BIN)/python docs/lane_diagram.py --check
	$(BIN)/python docs/api_reference.py --check
	$(BIN)/python docs/metrics_table.py --check
	$(BIN)/python docs/settings_reference.py --check
	$(BIN)/python docs/limits_table.py --check
	$(BIN)/python docs/http_reference.py --check
	$(BIN)/python client/make_sync.py --check
	$(BIN)/python gen/versions.py --check

proto: $(PROTO_READY) $(GO_READY) ## Generate the Python and the Go code of proto/
	find $(GENERATED) -name '*_pb2*' -delete
	$(call generate,client)
	rm -rf gen/go/runlane
	$(call generate_go,gen/go)

docs: $(READY) ## Write the generated parts of the docs, and the synchronous client
	$(BIN)/python docs/lane_diagram.py
	$(BIN)/python docs/api_reference.py
	$(BIN)/python docs/metrics_table.py
	$(BIN)/python docs/settings_reference.py
	$(BIN)/python docs/limits_table.py
	$(BIN)/python docs/http_reference.py
	$(BIN)/python client/make_sync.py
	$(BIN)/python gen/versions.py

site: $(SITE_READY) ## Build the site of docs/ into dist/site, without remote fonts or scripts; with VERSION beside earlier ones in SITES
	$(SITE_VENV)/bin/python docs/site.py .cache/site/pages
	$(if $(VERSION),SITE_VERSIONS=mike SITE_DIR=$(abspath $(SITES))/$(VERSION)) NO_MKDOCS_2_WARNING=1 \
		$(SITE_VENV)/bin/mkdocs build --strict --config-file docs/mkdocs.yml
	$(SITE_VENV)/bin/python tests/deploy/site.py $(if $(VERSION),$(SITES)/$(VERSION),dist/site)
	$(if $(VERSION),$(SITE_VENV)/bin/python docs/site_versions.py $(SITES))

audit: ## Check every version in constraints.txt for known vulnerabilities
	$(PYTHON) -m venv .cache/audit-venv
	.cache/audit-venv/bin/pip install --quiet --disable-pip-version-check pip-audit
	.cache/audit-venv/bin/pip-audit --strict --disable-pip --no-deps --requirement constraints.txt

licenses: ## List the license of every package in constraints.txt; fail if one is unknown
	rm -rf .cache/licenses
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --root-user-action ignore --no-deps --target .cache/licenses --requirement constraints.txt
	$(PYTHON) tests/deploy/licenses.py .cache/licenses

format: $(READY) ## Format code and proto
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	cd proto && ../$(BIN)/buf format --write

constraints: ## Write constraints.txt again, with the latest versions
	rm -rf .cache/fresh-venv && $(PYTHON) -m venv .cache/fresh-venv
	.cache/fresh-venv/bin/pip install --quiet '.[dev]'
	{ head -n 1 constraints.txt; .cache/fresh-venv/bin/pip freeze --exclude runlane; } > .cache/constraints.txt
	mv .cache/constraints.txt constraints.txt

# The extra a2a names this project, which the image builds from its own source.
image-requirements: ## Write the hashes of what the image installs, at the versions of constraints.txt
	rm -rf .cache/hash-venv && $(PYTHON) -m venv .cache/hash-venv
	.cache/hash-venv/bin/pip install --quiet --disable-pip-version-check pip-tools
	$(hashes) --output-file deploy/requirements.txt $(addprefix --extra ,server postgres uvloop metrics traces jwt web a2a chat acp secrets) pyproject.toml
	sed -i '/^# WARNING: pip install/,/^runlane @/d' deploy/requirements.txt
	echo 'hatchling>=1.27' > .cache/build.in
	$(hashes) --output-file deploy/build-requirements.txt .cache/build.in

clean: ## Remove all files that the targets made, except databases
	rm -rf $(VENV) .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis dist build

$(READY): pyproject.toml constraints.txt
	$(new_venv)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

$(RUN_READY): pyproject.toml constraints.txt
	@echo "Installing the server and its dependencies into $(VENV), once; this takes about half a minute."
	@$(new_venv)
	@$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[$(RUN_EXTRAS)]'
	@touch $@

$(PROTO_READY): proto/requirements.txt
	$(PYTHON) -m venv $(PROTO_VENV)
	$(PROTO_VENV)/bin/pip install --quiet --disable-pip-version-check --requirement $<
	touch $@

.cache/agents/%/.ready:
	rm -rf $(@D) && mkdir -p $(@D)
	npm install --no-fund --no-audit --ignore-scripts --prefix $(@D) $(AGENT_$*)
	touch $@

$(GO_READY):
	@command -v go >/dev/null || { echo "go is not installed, and generates gen/go: install Go 1.23 or later" >&2; exit 1; }
	rm -rf $(GO_PLUGINS) && mkdir -p $(GO_PLUGINS)
	GOBIN=$(CURDIR)/$(GO_PLUGINS) go install google.golang.org/protobuf/cmd/protoc-gen-go@v1.36.11
	GOBIN=$(CURDIR)/$(GO_PLUGINS) go install google.golang.org/grpc/cmd/protoc-gen-go-grpc@v1.5.1
	touch $@

$(KUBE_READY): tests/deploy/kubernetes/go.mod
	@command -v go >/dev/null || { echo "go is not installed, and builds the API server: install Go 1.25 or later" >&2; exit 1; }
	rm -rf $(KUBE) && mkdir -p $(KUBE)/module && cp $< $(KUBE)/module
	GOBIN=$(CURDIR)/$(KUBE) go install helm.sh/helm/v3/cmd/helm@$(HELM_VERSION)
	$(call build_kube,etcd,go.etcd.io/etcd/server/v3)
	$(call build_kube,kubectl,k8s.io/kubernetes/cmd/kubectl)
	$(call build_kube,kube-apiserver,k8s.io/kubernetes/cmd/kube-apiserver)
	touch $@

$(SITE_READY): docs/site-requirements.txt
	$(PYTHON) -m venv $(SITE_VENV)
	$(SITE_VENV)/bin/pip install --quiet --disable-pip-version-check --requirement $<
	touch $@

$(BUILD_READY):
	$(PYTHON) -m venv $(BUILD_VENV)
	$(BUILD_VENV)/bin/pip install --quiet --disable-pip-version-check build==1.6.1 twine==7.0.0 'readme_renderer[md]' \
		'cyclonedx-bom[json-validation]==7.5.0'
	touch $@

define new_venv
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Runlane needs Python 3.11 or later")' \
		&& $(PYTHON) -m venv $(VENV)
endef

# Before anything is installed.
define check_address
	case "$(LISTEN)" in unix:*) exit 0;; esac; \
	$(PYTHON) -c 'import socket, sys; host, _, port = sys.argv[1].rpartition(":"); \
	family = socket.AF_INET6 if ":" in host else socket.AF_INET; \
	socket.create_server((host.strip("[]"), int(port)), family=family)' "$(LISTEN)" 2>/dev/null \
	|| { echo "cannot listen on $(LISTEN): it is in use, or not an address of this machine;" \
		"stop that server, or choose another: make run LISTEN=127.0.0.1:50052" >&2; exit 1; }
endef

# Without the address of the index: whoever builds the image chooses it.
hashes = .cache/hash-venv/bin/pip-compile --quiet --generate-hashes --strip-extras --no-header --no-annotate \
	--no-emit-index-url --no-emit-trusted-host --no-emit-options --constraint constraints.txt

# A release must not break the interface of the previous one. Before the first one, nothing is compared.
define breaking
	release=$$(git describe --tags --abbrev=0 --match 'v*' 2>/dev/null) || exit 0; \
	echo "the interface since $$release"; \
	$(BIN)/buf breaking proto --against ".git#tag=$$release,subdir=proto"
endef

# Only files with a service: the others would get empty gRPC modules.
define generate
	PATH="$(CURDIR)/$(PROTO_VENV)/bin:$$PATH" python -m grpc_tools.protoc --proto_path=proto \
		--python_out=$(1) --mypy_out=quiet:$(1) $(PROTOS)
	PATH="$(CURDIR)/$(PROTO_VENV)/bin:$$PATH" python -m grpc_tools.protoc --proto_path=proto \
		--grpc_python_out=$(1) --mypy_grpc_out=quiet:$(1) $(filter %_service.proto,$(PROTOS))
endef

# Helm asks the API server for its version, which its own build script would set.
define build_kube
	cd $(KUBE)/module && go build -mod=mod -buildvcs=false -o ../$(1) -ldflags "-s -w \
		-X k8s.io/component-base/version.gitVersion=$(KUBE_VERSION) -X k8s.io/component-base/version.gitMajor=1 \
		-X k8s.io/component-base/version.gitMinor=$(word 2,$(subst ., ,$(KUBE_VERSION)))" $(2)
endef

define generate_go
	PATH="$(CURDIR)/$(PROTO_VENV)/bin:$(CURDIR)/$(GO_PLUGINS):$$PATH" python -m grpc_tools.protoc --proto_path=proto \
		--go_out=$(1) --go_opt=module=$(GO_MODULE) \
		--go-grpc_out=$(1) --go-grpc_opt=module=$(GO_MODULE) $(PROTOS)
endef
