# Two commands to begin with: `make demo` and `make test`. Each sets up what it needs.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
OLDEST := .venv-oldest
# Test files are shared by a process for each core; those that take minutes come first (tests/conftest.py).
PARALLEL := -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder

.PHONY: help setup demo test test-all coverage test-avx2 test-gpu test-oldest-torch lint format bench bench-gpu audit clean browser

help:  ## this list
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 20

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; name one with: make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

setup: $(READY)  ## a virtual environment with the pinned dependencies

demo: $(READY)  ## the whole pipeline on handwritten digits, then the path of its report
	$(BIN)/sftok run digits

browser:
	@sh tests/find_browser.sh || true

test: $(READY) browser  ## the default tests
	$(BIN)/python -m pytest $(PARALLEL)

test-all: $(READY) browser  ## all tests that this machine can run
	$(BIN)/python -m pytest -m "not gpu"

coverage: $(READY) browser  ## the default tests, and which lines and branches they run
	$(BIN)/python -m pytest $(PARALLEL) --cov --cov-report=term

test-avx2: $(READY)  ## the numeric tests, as a CPU without AVX-512 computes
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 \
		$(BIN)/python -m pytest tests/sftok tests/generator tests/infra

test-gpu: $(READY)  ## the tests that need a CUDA device
	@$(BIN)/python -m tests.support.need_cuda
	$(BIN)/python -m pytest -m gpu

# What of constraints.txt goes with its torch is left out.
$(OLDEST)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(OLDEST)
	grep -vE '^(torch|torchvision|triton)==|^(nvidia|cuda)-' constraints.txt > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -c $(OLDEST)/constraints.txt \
		'torch==2.11.*' 'torchvision==0.26.*' -e '.[test]'
	@touch $@

test-oldest-torch: $(OLDEST)/.ready  ## the numeric tests with torch 2.11, in an environment of its own (6 GB)
	$(OLDEST)/bin/python -m pytest tests/sftok tests/generator tests/infra -m "not slow and not gpu and not s3"

lint: $(READY)  ## style, types, imports and dropped results
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pylint flows sftok generator infra

.PHONY: docs
docs: $(READY)  ## check the links of the documents and build their site, in build/docs
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

format: $(READY)  ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(READY)  ## measurements, printed as ratios
	$(BIN)/python -m tests.benchmarks

bench-gpu: $(READY)  ## measurements of a CUDA device, in ten minutes
	$(BIN)/python -m tests.benchmarks --device cuda

audit: $(READY)  ## bill of materials, licences and known vulnerabilities of what is installed, in build/audit
	test -x .venv-audit/bin/pip-audit || { $(PYTHON) -m venv .venv-audit && .venv-audit/bin/python -m pip install \
		--quiet --disable-pip-version-check -r infra/deploy/audit-requirements.txt; }
	mkdir -p build/audit
	.venv-audit/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible --of JSON \
		-o build/audit/bill-of-materials.cdx.json $(BIN)/python
	.venv-audit/bin/pip-licenses --python $(BIN)/python --from mixed --order license --format markdown --with-urls \
		--output-file build/audit/licences.md
	.venv-audit/bin/pip-audit --strict --disable-pip --no-deps -r constraints.txt -f markdown \
		-o build/audit/vulnerabilities.md || { \
		echo "not audited, or not clean: see above; advisories come from pypi.org, or with -s osv from api.osv.dev"; \
		exit 1; }

clean:  ## remove what was built; the store is kept
	rm -rf .venv .venv-audit $(OLDEST) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis .coverage
	find . -name __pycache__ -prune -exec rm -rf {} +
