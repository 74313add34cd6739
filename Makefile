# Every target builds what it needs, the virtual environment included, from nothing but Python >= 3.11.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: serve test gpu-test check bench proto clean

## talk to the demo model (until the cluster exists: in one process)
serve: $(VENV)
	$(BIN)/eightfold chat

## the tests that need no GPU; those that start a Ray run alone, for a Ray wants the machine while it starts
test: $(VENV)
	$(BIN)/python -m pytest -m "not gpu and not ray" --numprocesses auto --maxprocesses 8 --dist loadfile
	$(BIN)/python -m pytest -m ray

## the tests that need an NVIDIA GPU
gpu-test: $(VENV)
	$(BIN)/python -m pytest -m gpu

## format, lint, types, and who imports whom
check: $(VENV)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

## compare with transformers on this machine
bench: $(VENV)
	$(BIN)/python benchmarks/generate.py

## generate the gRPC stubs anew
proto: $(VENV)
	$(BIN)/python -m grpc_tools.protoc --proto_path=. --python_out=. --pyi_out=. --grpc_python_out=. \
		cluster/proto/eightfold/v1/eightfold.proto

$(VENV): requirements-dev.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Eightfold needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $(VENV)

clean:
	rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
