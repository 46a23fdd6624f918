# demo: the main job; test: the suite, two files at a time, because many tests wait more than they
# compute; test-slow: what takes long of it; check: lint, types, stubs; protos: the stubs; bench: the
# benchmarks. All of these set up .venv first. wheel: dist/*.whl, to install on other machines.
# DEMO_FLAGS="--seeds 0 1 2" goes to the demo.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_FLAGS ?=

.PHONY: demo test test-slow check protos bench wheel

demo: $(VENV)/ready
	$(BIN)/python -m examples.demo $(DEMO_FLAGS)

test: $(VENV)/ready
	$(BIN)/python -m pytest -n 2 --no-loadscope-reorder -m "not slow"

test-slow: $(VENV)/ready
	$(BIN)/python -m pytest -m slow

check: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/python -m pytest -q tests/protos

protos: $(VENV)/ready
	$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. --grpc_python_out=. \
		protos/teacher.proto

bench: $(VENV)/ready
	$(BIN)/python -m benchmarks.stream
	$(BIN)/python -m benchmarks.stream --mixed
	$(BIN)/python -m benchmarks.engine
	$(BIN)/python -m benchmarks.head
	$(BIN)/python -m benchmarks.generate
	$(BIN)/python -m benchmarks.select
	$(BIN)/python -m benchmarks.transport
	$(BIN)/python -m benchmarks.codec
	$(BIN)/python -m benchmarks.losses
	$(BIN)/python -m benchmarks.hf_trainer
	$(BIN)/python -m benchmarks.waiting
	$(BIN)/python -m benchmarks.record
	$(BIN)/python -m benchmarks.fairness
	$(BIN)/python -m benchmarks.autoscaling
	$(BIN)/python -m benchmarks.faults
	$(BIN)/python -m benchmarks.edge

wheel:
	$(PYTHON) -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .

# torch goes first and by its exact version: that is how a CPU build is found where there is one.
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		"$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		-c constraints.txt -e '.[server,train,ray-train,eval,dev,bench]'
	touch $@
