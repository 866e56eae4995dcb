# Recipes. `make` lists them; CI runs the same ones.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PROTO_VENV := .venv-proto
PROTO_FILES := $(wildcard proto/magnetar/v1/*.proto proto/magnetar/etcd/*.proto)

.DEFAULT_GOAL := help
.PHONY: help demo test cluster-test sim soak takeover hand-off repair rebalance bench bench-check bench-peers
.PHONY: check proto proto-check deploy-check clean

help: ## List the recipes
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

demo: $(VENV)/.server ## Publish and read 27,004 real flights, kill the server, check that all is still there
	$(BIN)/python tests/demo.py

test: $(VENV)/.dev ## The fast test suite, in two processes
	$(BIN)/python -m pytest -n 2 --dist worksteal

cluster-test: $(VENV)/.dev ## Kill, pause, cut off and fill a cluster of real processes under load; ONLY= names some tests
	$(BIN)/python -m pytest -s --durations 20 $(or $(ONLY),tests/cluster)

sim: $(VENV)/.dev ## Simulated clusters under faults: SEEDS=n (FIRST=x fixes the first), or SEED=x again
	$(BIN)/python tests/simulation/run.py $(if $(SEED),--seed $(SEED),--seeds $(or $(SEEDS),100) $(if $(FIRST),--first $(FIRST)))

soak: ROUNDS ?= 10
soak: $(VENV)/.dev ## The cluster tests ROUNDS times over, 10,000 seeds of the simulator, all planted bugs: hours
	for round in $$(seq $(ROUNDS)); do $(BIN)/python -m pytest tests/cluster -s || exit 1; done
	$(BIN)/python tests/simulation/run.py --seeds 10000 --brief
	$(BIN)/python tests/simulation/run.py --plant all --seeds 500

takeover: $(VENV)/.dev ## How long it takes until the topics of a killed broker are another one's: TOPICS=n of two brokers
	$(BIN)/python tests/performance/takeover.py --topics $(or $(TOPICS),2000)

hand-off: $(VENV)/.dev ## How long publishing pauses when a busy topic moves between living brokers, 500 times
	$(BIN)/python tests/performance/hand_off.py

repair: $(VENV)/.dev ## How long a lost bookie's part takes to be made anew, and what publishers notice: SIZE=5GB
	$(BIN)/python tests/performance/repair.py --size $(or $(SIZE),5GB)

rebalance: $(VENV)/.dev ## How long it takes until an empty bookie has its share of 5 GB, and how even disks are then
	$(BIN)/python tests/performance/rebalance.py

bench: $(VENV)/.dev ## Everything that has a target, measured: hours, QUICK=1 minutes; ONLY=words, DATA_DIR=on the disk to measure
	$(BIN)/python tests/performance/bench.py $(if $(QUICK),--quick) $(if $(ONLY),--only '$(ONLY)') --data-dir $(or $(DATA_DIR),.)

bench-check: $(VENV)/.dev ## Ratios of one short run that must hold on any machine
	$(BIN)/python tests/performance/bench.py --check --data-dir $(or $(DATA_DIR),.)

bench-peers: $(VENV)/.dev ## The same beside NATS, Kafka and Pulsar, which are fetched into MAGNETAR_PEERS_CACHE
	$(BIN)/python tests/performance/peers/run.py $(if $(ONLY),--only '$(ONLY)') --data-dir $(or $(DATA_DIR),.)

check: $(VENV)/.dev proto-check deploy-check ## Linters, types, contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/buf lint
	$(BIN)/lint-imports

deploy-check: $(VENV)/.dev ## Linters for what is in deploy/
	$(BIN)/hadolint deploy/Dockerfile
	$(BIN)/yamllint --strict --config-file deploy/yamllint.yaml deploy
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec deploy/compose.yaml
	deploy/systemd/verify.sh

proto: $(PROTO_VENV)/.ready ## Generate the protobuf stubs
	$(PROTO_VENV)/bin/python -m grpc_tools.protoc -Iproto --python_out=proto --pyi_out=proto $(PROTO_FILES)

proto-check: $(PROTO_VENV)/.ready ## Compare the stubs with their .proto files
	@out=$$(mktemp -d) && $(PROTO_VENV)/bin/python -m grpc_tools.protoc -Iproto --python_out=$$out --pyi_out=$$out $(PROTO_FILES) \
		&& for f in $$(cd $$out && find magnetar -type f); do cmp -s $$out/$$f proto/$$f || { echo "proto/$$f is stale: run make proto"; exit 1; }; done; \
		status=$$?; rm -rf $$out; exit $$status

clean: ## Remove environments and caches
	rm -rf $(VENV) $(PROTO_VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
		|| { echo "magnetar needs Python 3.11 or newer: apt-get install python3.11 python3.11-venv, or set PYTHON=/path/to/python"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null \
		|| { echo "this Python cannot make virtual environments: apt-get install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.server: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[server]'
	@touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[server,dev]'
	@touch $@ $(VENV)/.server

$(PROTO_VENV)/.ready: | $(VENV)/bin/python
	$(PYTHON) -m venv $(PROTO_VENV)
	$(PROTO_VENV)/bin/python -m pip install --quiet --disable-pip-version-check 'grpcio-tools==1.76.0'
	@touch $@
