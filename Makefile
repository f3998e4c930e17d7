# Runlane. `make run` and `make test` do all the set-up on a machine with Python 3.11 and make.

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SEEDS ?= 2000
START ?= 0
PROTO_VENV := .cache/proto-venv
PROTO_READY := $(PROTO_VENV)/.ready
PROTOS := $(wildcard proto/runlane/v1/*.proto proto/runlane/harness/v1/*.proto)
GENERATED := client/runlane/v1 client/runlane/harness/v1

# What takes its time: servers that are killed, disks that fail, faults that are planted.
PROOFS := tests/bench tests/proofs/conformance tests/proofs/crash tests/proofs/fuzz

# The tests start hundreds of servers, each of which would be compiled anew.
export PYTHONPYCACHEPREFIX := $(CURDIR)/.cache/pycache
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help run test test-proofs test-postgres test-polyglot bench check-lane sim crash nodes soak fuzz check lint types check-proto check-docs proto docs format audit constraints clean

help: ## Lists the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

run: $(READY) ## Starts a server on 127.0.0.1:50051 with a SQLite file and the echo agent
	$(BIN)/runlane-server --listen 127.0.0.1:50051 --store sqlite:///runlane.db --agent echo

test: $(READY) ## Runs the tests
	$(BIN)/pytest -n $(JOBS) --dist worksteal $(or $(TESTS),$(addprefix --ignore=,$(PROOFS)))

test-proofs: $(READY) ## Runs the tests that take longer: kills, failing disks, conformance, fuzzing
	$(BIN)/pytest -n $(JOBS) --dist worksteal $(or $(TESTS),$(PROOFS))

test-postgres: $(READY) ## Runs all that works over any store over PostgreSQL
	$(BIN)/pytest -n $(JOBS) --dist worksteal --store postgresql $(TESTS)

test-polyglot: $(READY) ## Tests the quickstarts and conformance clients in all languages, and the first-steps pages
	RUNLANE_POLYGLOT=1 $(BIN)/pytest -n $(or $(PROGRAMS),4) --dist worksteal $(or $(TESTS),tests/polyglot)

check-lane: $(READY) ## Searches all interleavings of commands on a lane of RUNS runs, DEPTH commands deep
	cd tests && ../$(BIN)/python -m proofs.sim.explore --depth $(or $(DEPTH),22) --runs $(or $(RUNS),3) --reservations 2

sim: $(READY) ## Simulates SEEDS worlds from START on: cancels, crashes, stale lanes; a virtual clock
	cd tests && ../$(BIN)/python -m proofs.sim.run --seeds $(SEEDS) --start $(START)

crash: $(READY) ## Kills a server under load, ROUNDS times; SEED repeats a failing round
	cd tests && ../$(BIN)/python -m proofs.crash.run --rounds $(or $(ROUNDS),20) $(if $(SEED),--seed $(SEED))

nodes: $(READY) ## Kills, stops and cuts off three nodes over PostgreSQL for MINUTES; SEED and FIRST repeat a round
	cd tests && ../$(BIN)/python -m proofs.crash.nodes_run --minutes $(or $(MINUTES),2) $(if $(SEED),--seed $(SEED)) $(if $(FIRST),--first $(FIRST) --rounds 1)

soak: $(READY) ## Opens and cancels streams and runs by the thousand; fails if the server grows
	cd tests && ../$(BIN)/python -m proofs.crash.soak

fuzz: $(READY) ## Tries inputs that nobody means, for SECONDS; SEED repeats them, ONLY names a target
	cd tests && ../$(BIN)/python -m proofs.fuzz.run --seconds $(or $(SECONDS),300) $(if $(SEED),--seed $(SEED)) $(if $(ONLY),--only $(ONLY))

bench: $(READY) ## Measures what it costs, set against bare gRPC; BENCH="--quick" is a short form
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[bench]'
	cd tests && $(abspath $(BIN))/python -m bench.run $(BENCH)

check: lint types check-proto check-docs ## Runs the linters, the type checkers and the freshness checks

lint: $(READY) ## Lints code and proto
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	cd proto && ../$(BIN)/buf lint && ../$(BIN)/buf format --diff --exit-code
	$(breaking)

types: $(READY) ## Checks the types
	$(BIN)/mypy
	$(BIN)/pyright --pythonpath $(BIN)/python

check-proto: $(PROTO_READY) ## Proves the generated code fresh
	rm -rf .cache/proto && mkdir -p .cache/proto
	$(call generate,.cache/proto)
	for part in $(GENERATED:client/%=%); do \
		diff -r -x __init__.py -x __pycache__ .cache/proto/$$part client/$$part || exit 1; \
	done

check-docs: $(READY) ## Proves the generated parts of the docs, and the synchronous client, fresh
	$(BIN)/python docs/lane_diagram.py --check
	$(BIN)/python docs/api_reference.py --check
	$(BIN)/python docs/metrics_table.py --check
	$(BIN)/python client/make_sync.py --check

proto: $(PROTO_READY) ## Generates the Python code of proto/
	find $(GENERATED) -name '*_pb2*' -delete
	$(call generate,client)

docs: $(READY) ## Writes the generated parts of the docs, and the synchronous client
	$(BIN)/python docs/lane_diagram.py
	$(BIN)/python docs/api_reference.py
	$(BIN)/python docs/metrics_table.py
	$(BIN)/python client/make_sync.py

audit: ## Asks the advisories of the package index about every version in constraints.txt
	$(PYTHON) -m venv .cache/audit-venv
	.cache/audit-venv/bin/pip install --quiet --disable-pip-version-check pip-audit
	.cache/audit-venv/bin/pip-audit --strict --disable-pip --no-deps --requirement constraints.txt

format: $(READY) ## Formats code and proto
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	cd proto && ../$(BIN)/buf format --write

constraints: ## Writes constraints.txt anew, with the latest versions
	rm -rf .cache/fresh-venv && $(PYTHON) -m venv .cache/fresh-venv
	.cache/fresh-venv/bin/pip install --quiet '.[dev]'
	{ head -n 1 constraints.txt; .cache/fresh-venv/bin/pip freeze --exclude runlane; } > .cache/constraints.txt
	mv .cache/constraints.txt constraints.txt

clean: ## Removes what the targets made; databases stay
	rm -rf $(VENV) .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis dist build

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Runlane needs Python 3.11 or later")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

$(PROTO_READY): proto/requirements.txt
	$(PYTHON) -m venv $(PROTO_VENV)
	$(PROTO_VENV)/bin/pip install --quiet --disable-pip-version-check --requirement $<
	touch $@

# What a release has promised is not broken. Before the first one there is nothing to compare with.
define breaking
	release=$$(git describe --tags --abbrev=0 --match 'v*' 2>/dev/null) || exit 0; \
	echo "the interface since $$release"; \
	$(BIN)/buf breaking proto --against ".git#tag=$$release,subdir=proto"
endef

# Services come with stubs of their own; files without a service would get empty ones.
define generate
	PATH="$(CURDIR)/$(PROTO_VENV)/bin:$$PATH" python -m grpc_tools.protoc --proto_path=proto \
		--python_out=$(1) --mypy_out=quiet:$(1) $(PROTOS)
	PATH="$(CURDIR)/$(PROTO_VENV)/bin:$$PATH" python -m grpc_tools.protoc --proto_path=proto \
		--grpc_python_out=$(1) --mypy_grpc_out=quiet:$(1) $(filter %_service.proto,$(PROTOS))
endef
