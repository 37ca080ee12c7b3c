# Two commands do everything on a fresh machine with Python >= 3.11 and a C compiler: `make demo` and `make test`.

PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help setup demo wheel test test-compat fast e2e torture soak fuzz analyze docs bench bench-gpu lint clean

help: ## show this list
	@sed -n 's/^\([a-z0-9-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 8

setup: ## make .venv, install the pinned versions, build the C engine
	@test -n "$(PYTHON)" || { echo "kvoffload needs Python 3.11 or newer: make PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) tools/bootstrap.py

demo: setup ## serve a small model with vLLM + kvoffload; show what each tier saves
	@$(BIN)/python examples/demo.py

wheel: ## one wheel for every Python from 3.11 on, liburing inside, in dist/ (needs no vLLM)
	@$(PYTHON) tools/bootstrap.py wheel dist

# Two processes: most of what a test of a real vLLM does is one core's work.
test: setup ## every test, a real vLLM included (up to 15 minutes on 2 cores)
	@$(BIN)/python tools/run_tests.py -n 2 --dist loadfile $(ARGS)

fast: setup ## the tests that start no vLLM
	@$(BIN)/python tools/run_tests.py -m "not e2e" $(ARGS)

e2e: setup ## the tests on a real vLLM only
	@$(BIN)/python tools/run_tests.py -m e2e $(ARGS)

test-compat: setup ## the tests on the oldest supported vLLM for CPUs, and a look through 0.26 and 0.33 (4 GB, once)
	@$(BIN)/python tools/compat.py $(ARGS)

soak: setup ## ten minutes of real vLLMs on one path: caps kept, nothing grows, answers stay the same
	@$(BIN)/python -m tests.torture.soak $(ARGS)

torture: setup ## random plans under faults, kills, power losses and damaged bytes, in full (an hour)
	@$(BIN)/python -m tests.torture.random_plans $(ARGS)
	@$(BIN)/python -m tests.torture.crash_points --kills 1000
	@$(BIN)/python -m tests.torture.power_loss --images 1000
	@$(BIN)/python -m tests.torture.byte_flips

fuzz: setup ## every reader of bytes on disk, FUZZ_SECONDS (600) for each of six targets; TARGETS chooses some
	@$(PYTHON) tools/bootstrap.py fuzz
	@$(BIN)/python -m tests.fuzz.run $(TARGETS)

analyze: setup ## clang's warnings and static analysers on all C, tests included: any finding is an error
	@$(PYTHON) tools/bootstrap.py analyze
	@$(BIN)/python tools/analyze.py

docs: setup ## the documentation as a site, in build/site
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build -q

bench: setup ## the benchmarks (an hour; the drive's needs fio)
	@for benchmark in drive loads_first small_costs decisions policies zero_hit load_or_recompute; do $(BIN)/python -m benchmarks.bench_$$benchmark || exit 1; done
	@$(BIN)/python -m pytest -q --benchmark-enable --benchmark-columns=min,median,max,rounds benchmarks $(ARGS)

bench-gpu: setup ## the CUDA path on a real GPU: bytes, rates, and what copies cost compute
	@$(BIN)/python -m benchmarks.bench_gpu $(ARGS)

lint: setup ## style
	@$(BIN)/ruff check .

clean: ## remove what the build made (.venv stays)
	rm -rf build dist *.egg-info kvoffload/*.so kvoffload/engine/*.so .pytest_cache .benchmarks .hypothesis
