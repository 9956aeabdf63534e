# Two commands: `make demo` and `make test`. Both build .venv when it is missing or out of date. `make bench` has an
# environment of its own, because breaching needs torchvision.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := -m pip install --quiet --disable-pip-version-check -c constraints.txt
INSTALL := $(BIN)/python $(PIP)
BENCH := .venv-bench
FLOWER_OLDEST ?= 1.28.0
FLOWER_NEWEST ?= 1.41.0
BENCH_OPTIONS ?=
SHORT := docs/benchmarks/short
PEER := regularization.total_variation.scale=0.05 optim.step_size_decay=cosine-decay

.PHONY: demo test lint types imports pytest bench bench-env flower-test flower-example flare-test clean help

help:
	@echo "make demo   install and audit real medical images, report in out/demo/"
	@echo "make test   install, lint, types, import rule, doctests and tests"
	@echo "make lint   ruff, mypy and import-linter only"
	@echo "make flower-test  tests of the Flower integration on the oldest and the newest Flower (.venv-flower-oldest, -newest)"
	@echo "make flower-example  the Flower example plain, with noise and behind SecAgg+ on the newest Flower, and one report of all"
	@echo "make flare-test   tests of the NVIDIA FLARE integration (.venv-flare)"
	@echo "make bench  speed and quality beside breaching (installed into .venv-bench) and the papers' recipes: tables and"
	@echo "            figures in docs/benchmarks/, under 10 minutes; on a GPU where there is one"

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "MedPFL needs Python 3.11 or newer; set PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(INSTALL) -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(INSTALL) -e '.[dev]'
	@touch $@ $(VENV)/.installed

demo: $(VENV)/.installed
	$(BIN)/medpfl demo --out out/demo

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint
	$(BIN)/python -m pytest -n 2 --dist worksteal

# MedPFL's own versions first, then what that Flower asks for beside them: the two differ in what they allow.
.venv-flower-%/.installed: pyproject.toml constraints.txt Makefile
	$(PYTHON) -m venv .venv-flower-$*
	.venv-flower-$*/bin/python $(PIP) -e . pytest pytest-timeout
	.venv-flower-$*/bin/python -m pip install --quiet --disable-pip-version-check -e '.[flower]' flwr==$(FLOWER_VERSION)
	@touch $@

.venv-flower-oldest/.installed: FLOWER_VERSION = $(FLOWER_OLDEST)
.venv-flower-newest/.installed: FLOWER_VERSION = $(FLOWER_NEWEST)

flower-test: .venv-flower-oldest/.installed .venv-flower-newest/.installed
	for which in oldest newest; do \
	    .venv-flower-$$which/bin/python -c 'import flwr; print("Flower", flwr.__version__)' && \
	    .venv-flower-$$which/bin/python -m pytest -rs tests/integrations || exit 1; \
	done

# Drawn images; real ones with FLOWER_DATA=folder of brain MRI.
FLOWER_OUT ?= out/flower
FLOWER_DATA ?=
FLOWER_RUN = .venv-flower-newest/bin/python examples/flower/run.py

flower-example: .venv-flower-newest/.installed
	for what in simulate noise secure; do $(FLOWER_RUN) $$what --out $(FLOWER_OUT) --data '$(FLOWER_DATA)' || exit 1; done
	PYTHONPATH=examples/flower .venv-flower-newest/bin/medpfl replay $(addprefix $(FLOWER_OUT)/,simulate noise secure) \
	    --model brain.task:Net --size 32 --truth $(FLOWER_OUT) --pool $(FLOWER_OUT)/simulate-pool \
	    --recipe '{learning_rate: 0.1}' --recipe 'secure={learning_rate: 0.1, batch_size: 4}' \
	    --defense 'noise={compose: [{name: clip, bound: 1.0}, {name: gaussian, std: 0.01}]}' \
	    --attack '{name: idlg, iterations: 10}' --attack '{name: gradinv, iterations: 200}' \
	    --attack '{name: maximum_a_posteriori, iterations: 100}' --out $(FLOWER_OUT)/replay

.venv-flare/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-flare
	.venv-flare/bin/python $(PIP) -e '.[nvflare]' pytest pytest-timeout
	@touch $@

flare-test: .venv-flare/.installed
	.venv-flare/bin/python -c 'import nvflare; print("NVIDIA FLARE", nvflare.__version__)'
	.venv-flare/bin/python -m pytest -rs tests/integrations

$(BENCH)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/python $(PIP) -e . breaching==0.1.2
	@touch $@

bench-env: $(BENCH)/.installed

bench: bench-env
	$(BENCH)/bin/python benchmarks/speed.py --short $(BENCH_OPTIONS)
	mkdir -p $(SHORT)
	$(BENCH)/bin/python benchmarks/reference_recipes.py --victims 4 --most-calls 100 --out $(SHORT)
	rm -f $(SHORT)/gradinv.csv
	$(BENCH)/bin/python benchmarks/gradinv_quality.py --victims 4 --budgets 25 50 --csv $(SHORT)/gradinv.csv \
	    --peer-set $(PEER) --table $(SHORT)/gradinv.md --figure $(SHORT)/gradinv.png

clean:
	rm -rf $(VENV) $(BENCH) .venv-flower-oldest .venv-flower-newest .venv-flare out
