# make demo   environment, build, and a comparison of selection strategies on a small data set, with a report
# make test   environment, build, and every test that this machine can run
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test build bench bench-quick lint format clean

demo: build
	$(BIN)/fastsel compare digits

test: build
	FASTSEL_REQUIRE_SIMT=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

# Rebuilding is cheap when nothing changed: pip is skipped unless the requirements did, ninja looks at the sources.
build: $(VENV)/.requirements
	@command -v $${CXX:-c++} >/dev/null || { echo "fastsel: no C++ compiler found; install g++ (12 or newer) or set CXX" >&2; exit 1; }
	@echo "building fastsel (two minutes the first time, more with nvcc on a slow machine)"
	@$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps -e .

$(VENV)/.requirements: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "fastsel: needs Python 3.10 or newer, $(PYTHON) is older; set PYTHON=python3.x" >&2; exit 1; }
	@echo "making the environment $(VENV) with torch and what requirements.txt names"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --progress-bar on -r requirements.txt
	@touch $@

# Without their dependencies, which would pull another torch.
$(VENV)/.bench-requirements: bench/requirements.txt $(VENV)/.requirements
	@$(BIN)/python -m pip install --quiet --no-deps -r bench/requirements.txt
	@touch $@

bench: build $(VENV)/.bench-requirements
	$(BIN)/python -m pytest bench -q -o python_files="bench_*.py" -o python_functions="bench_*" -o pythonpath="bench tests" --benchmark-only --benchmark-disable-gc

bench-quick: build $(VENV)/.bench-requirements
	FASTSEL_BENCH_QUICK=1 $(BIN)/python -m pytest bench -q -o python_files="bench_*.py" -o python_functions="bench_*" -o pythonpath="bench tests" --benchmark-only --benchmark-disable-gc

lint: build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy && MYPYPATH=tests $(BIN)/mypy bench
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')

format: build
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')

clean:
	rm -rf build dist fastsel/lib *.egg-info
