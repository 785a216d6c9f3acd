# `make test` and `make example` need Python 3.10+ and make; they set up .venv themselves.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: test docs figures example example-seeds benchmark study coverage soak mutants check lint types wheel clean
.DEFAULT_GOAL := test

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps djangocms-katex  # for its KaTeX
	touch $@

test: .venv/ready            ## everything that is tested: mathematics, modules, docs, examples
	$(BIN)/python -m pytest $(PYTEST_ARGS)

docs: .venv/ready            ## the documentation site, readable offline, into build/site; fails on a broken link
	$(BIN)/python tools/site.py

figures: .venv/ready         ## the pictures of docs/images that are drawn from the library
	OMP_NUM_THREADS=1 $(BIN)/python tools/figures.py

example: .venv/ready         ## the full method, both phases, on the embedded images
	$(BIN)/python examples/cifar_train.py --out runs/example --overwrite $(ARGS)

example-seeds: .venv/ready   ## the example over seeds and weight decays; writes benchmarks/results/
	$(BIN)/python benchmarks/example_seeds.py $(ARGS)

benchmark: .venv/ready       ## what a term costs; writes benchmarks/results/
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/speed.py $(ARGS)

study: .venv/ready           ## the accuracy study on MNIST-1D at the settings that were tuned; writes benchmarks/results/accuracy/
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[study]'
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/accuracy.py $(ARGS)

coverage: .venv/ready        ## every line and branch of src/ is run by a test, or says why not
	$(BIN)/python -m pytest --cov --cov-report=term-missing:skip-covered --cov-fail-under=100 $(PYTEST_ARGS)

soak: .venv/ready            ## long runs, kills, a store for ImageNet at full size; writes benchmarks/results/
	$(BIN)/python benchmarks/soak.py $(ARGS)

mutants: .venv/ready         ## changes of src/ that no test notices, by mutmut; more than an hour; writes benchmarks/results/
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[mutation]'
	OMP_NUM_THREADS=1 $(BIN)/mutmut run --max-children 1 $(ARGS)
	$(BIN)/python benchmarks/mutation.py

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/typos

types: .venv/ready
	$(BIN)/mypy

wheel: .venv/ready           ## build, then install into a clean environment and import
	rm -rf dist build/wheel-venv
	$(BIN)/python -m build --wheel --outdir dist
	$(PYTHON) -m venv build/wheel-venv
	build/wheel-venv/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt dist/*.whl
	cd build && wheel-venv/bin/python -W ignore -c "import aikd_losses; print('wheel:', aikd_losses.__version__, aikd_losses.AIKDLoss(8, 3, 2))"

check: lint types wheel

clean:
	rm -rf .venv build dist runs mutants
