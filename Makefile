# `make` lists the targets. They need Python 3.10+ and make, and set up .venv themselves; `make example` has a small one.
PYTHON ?= python3
BIN := .venv/bin
# Two processes, a file of tests in one of them, so that what its tests share is made once. PYTEST_ARGS="-n 0 FILE" for one file.
PYTEST = $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: help test docs figures example example-seeds benchmark study coverage import-time soak mutants oldest check lint types
.PHONY: gpu gpu-rehearsal gpu-page
.PHONY: dist setup clean
.DEFAULT_GOAL := help

help:                        ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

.venv/ready: pyproject.toml constraints.txt
	@echo "Installing all that tests and documentation need into .venv (torch, the frameworks of the examples, tools) ..."
	@echo "It is more than 2 GB and takes some minutes. 'make example' needs less."
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps djangocms-katex  # for its KaTeX
	touch $@

setup: .venv/ready           ## everything that is needed to work on it

test: .venv/ready            ## everything that is tested: mathematics, modules, docs, examples
	$(PYTEST) $(PYTEST_ARGS)

docs: .venv/ready            ## the documentation site, readable offline, into build/site; fails on a broken link
	$(BIN)/python tools/site.py
	@echo "The site is in build/site: open build/site/index.html in a browser."
	@echo "The search needs a server: $(BIN)/python -m http.server -d build/site, then http://localhost:8000"

figures: .venv/ready         ## the pictures of docs/images that are drawn from the library
	OMP_NUM_THREADS=1 $(BIN)/python tools/figures.py

# What the example needs and no more: `datasets` is for other data sets. An environment for development serves as well.
.venv-example/ready: pyproject.toml constraints.txt
	@echo "Making a Python environment for the example, .venv-example ..."
	$(PYTHON) -m venv .venv-example
	@echo "Installing torch and three small packages into .venv-example: einops, matplotlib, rich ..."
	@echo "Most of it is torch. For its much smaller CPU build set PIP_EXTRA_INDEX_URL to PyTorch's index of CPU builds."
	.venv-example/bin/pip install --no-compile --disable-pip-version-check --constraint constraints.txt --editable . matplotlib rich
	touch $@

example: BIN := $(if $(wildcard .venv/ready),.venv,.venv-example)/bin
example: $(if $(wildcard .venv/ready),,.venv-example/ready)  ## the full method, both phases, on the embedded images
	@echo "Training both phases with $(BIN)/python, half a minute on one CPU core ..."
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python examples/cifar_train.py --out runs/example --overwrite $(ARGS)

example-seeds: .venv/ready   ## the example over seeds and weight decays; writes benchmarks/results/
	$(BIN)/python benchmarks/example_seeds.py $(ARGS)

benchmark: .venv/ready       ## what a term costs; writes benchmarks/results/
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/speed.py $(ARGS)

import-time: .venv/ready     ## what importing costs beyond torch; writes benchmarks/results/
	$(BIN)/python benchmarks/import_time.py $(ARGS)

study: .venv/ready           ## one task of the study of accuracy once more, by the settings that were found; writes runs/study/
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[study]'
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/study/accuracy.py $(or $(ARGS),--repeat mnist1d-4000-40-mlp)

coverage: .venv/ready        ## every line and branch of src/ is run by a test, or says why not
	$(PYTEST) --cov --cov-report=term-missing:skip-covered --cov-fail-under=100 $(PYTEST_ARGS)

soak: .venv/ready            ## long runs, kills, a store for ImageNet at full size; writes benchmarks/results/
	$(BIN)/python benchmarks/soak.py $(ARGS)

mutants: .venv/ready         ## changes of src/ that no test notices, by mutmut, or of one file: ARGS="aikd_losses.stack.*"; writes benchmarks/results/
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[mutation]'
	OMP_NUM_THREADS=1 $(BIN)/mutmut run --max-children $(or $(JOBS),1) $(foreach pattern,$(ARGS),'$(pattern)')
	$(BIN)/python benchmarks/mutation.py

oldest: BIN := .venv-oldest/bin
oldest:                      ## the suite with the lowest declared version of all it needs (6 GB, Python 3.10 to 3.12); writes benchmarks/results/
	rm -rf .venv-oldest
	$(PYTHON) -m venv .venv-oldest
	$(BIN)/pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --resolution lowest-direct --editable '.[suite]'
	bash -o pipefail -c '{ $(BIN)/python benchmarks/oldest.py && $(PYTEST) -q -rs $(PYTEST_ARGS); } | tee benchmarks/results/oldest.txt'

gpu:                         ## the steps to run on a machine with a GPU, and what to bring back
	@benchmarks/on_gpu.sh

gpu-rehearsal: .venv/ready   ## all of these steps, small, on a CPU; a minute
	for step in tests speed train; do REHEARSE=1 OUT=runs/gpu-rehearsal PYTHON=$(BIN)/python OMP_NUM_THREADS=1 benchmarks/on_gpu.sh $$step || exit 1; done

gpu-page: .venv/ready        ## docs/gpu.md from what a GPU brought back
	$(BIN)/python benchmarks/speed.py --device cuda --page
	$(BIN)/python benchmarks/gpu_train.py --page

lint: .venv/ready            ## linter, formatter, spelling, and the library's size against its budget
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/typos
	$(BIN)/python tools/weight.py

types: .venv/ready           ## the type checker, strict
	$(BIN)/mypy

dist: .venv/ready            ## sdist and wheel, checked; then the wheel alone in a clean environment, and the quickstart there
	rm -rf dist build/clean build/sdist
	PIP_CONSTRAINT=$(CURDIR)/constraints.txt $(BIN)/python -m build --outdir dist
	$(BIN)/twine check --strict dist/*
	$(BIN)/check-wheel-contents dist/*.whl
	@size=$$(wc -c < $$(ls dist/*.whl)); echo "wheel: $$size bytes, at most 100000"; test $$size -le 100000
	mkdir -p build/sdist
	tar -xzf dist/*.tar.gz -C build/sdist --strip-components=1
	cd build/sdist && PYTHONPATH=src ../../$(BIN)/python -m pytest -q -p no:cacheprovider tests/test_release.py
	$(PYTHON) -m venv build/clean
	build/clean/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt dist/*.whl
	cd build/sdist && ../clean/bin/python -W ignore -c "import aikd_losses; print(aikd_losses.__version__, aikd_losses.__file__)"
	cd build/sdist && ../clean/bin/python -W ignore examples/quickstart.py

check: lint types dist       ## all of lint, types and dist

clean:                       ## removes environments, builds and runs
	rm -rf .venv .venv-oldest .venv-example build dist runs mutants
