# make demo   fine-tune a real pre-trained model with PSOFT and show the result (four minutes on two cores)
# make test   lint, types and every test, the slow ones on real models included
# make quick  the tests to run while you work: no slow ones, none for a GPU, a covering part of the contract;
#             `make quick PART=adapter` runs those of one package, a folder or a file of tests/ (hosts, contract, …)
# make product  every case of every test, where `make test` takes a covering part of products of over 30
# make gpu    on a machine with an NVIDIA GPU: what is right, how fast, how much memory, in 8 minutes; again to continue.
#             Needs no network and no virtual environment, only what is installed for $(PYTHON); `make gpu GPU=--dry-run`
#             tries it on a CPU, `make gpu GPU='--only step --minutes 3'` measures a part
# make lowest   a covering part of the tests under the oldest libraries that isotune supports (requirements/lowest.txt)
# make trainers TOOL=axolotl   a real training by another tool (axolotl, ms-swift, llamafactory), in an environment of its own
# make release-check   wheel and sdist as they would be published, installed anew, and the README's example run with them
# make docs   build the documentation into site/ with Python 3.11 or later; a broken link or formula is an error
# make constraints   resolve constraints.txt anew for every Python from 3.10 on, keeping the versions that still fit;
#                    `make constraints UPGRADE=--upgrade` takes the newest, `UPGRADE='-P torch -P peft'` those of some

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONSTRAINTS ?= constraints.txt
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS)
LOWEST := .venv-lowest
TRAINERS := .venv-$(TOOL)
RELEASE := build/release

.PHONY: demo test quick product lowest trainers gpu lint docs constraints release-check clean

demo: $(VENV)/.demo
	HF_HUB_OFFLINE=1 $(BIN)/isotune train demo

# One thread a worker: workers that each use all cores take several times as long as one alone.
ALONE := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
WORKERS := --numprocesses auto --dist worksteal
PYTEST := $(ALONE) $(BIN)/python -m pytest $(WORKERS)

test: lint
	$(PYTEST)

# What is looked for under tests/: a folder, or test_PART.py; nothing found is an error of pytest's.
quick: $(VENV)/.test
	ISOTUNE_TESTS=quick $(PYTEST) -m "not slow and not matrix and not gpu" \
		$(if $(PART),$(or $(wildcard tests/$(PART) tests/test_$(PART).py),tests/$(PART)),tests)

product: $(VENV)/.test
	ISOTUNE_TESTS=product $(PYTEST)

lowest: $(LOWEST)/.test
	ISOTUNE_TESTS=quick $(ALONE) $(LOWEST)/bin/python -m pytest $(WORKERS) -m "not slow and not matrix" \
		tests/test_contract.py tests/test_versions.py tests/test_internals.py tests/test_user_paths.py \
		tests/test_family_paths.py tests/files tests/hosts/test_experts.py tests/tools tests/tuner

trainers: $(TRAINERS)/.trainers
	$(ALONE) PYTHONPATH=src $(TRAINERS)/bin/python tests/integrations/run_trainers.py $(TOOL)

gpu:
	PYTHONPATH=src $(PYTHON) benchmarks/gpu.py --minutes 8 -o runs/gpu.json $(GPU)

lint: $(VENV)/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Formulas are an extension of this repository's.
docs: $(VENV)/.docs
	PYTHONPATH=docs_tools $(BIN)/zensical build --strict --clean

constraints: $(VENV)/.constraints
	$(BIN)/uv pip compile --quiet --universal --python-version 3.10 --no-python-downloads --no-annotate --no-header \
		--extra dev $(UPGRADE) --output-file constraints.txt pyproject.toml

# What a user gets from these files: torch as it is tried here, everything else as pip takes it today.
release-check: $(VENV)/.release
	rm -rf dist $(RELEASE)
	$(BIN)/python -m build --outdir dist .
	$(BIN)/twine check --strict dist/*
	$(PYTHON) -m venv $(RELEASE)
	$(RELEASE)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(RELEASE)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		"$$(ls dist/*.whl)[language]"
	cd $(RELEASE) && bin/isotune --help >/dev/null && bin/python $(CURDIR)/tests/pythons/readme.py

# One virtual environment, grown as targets ask for more; a stamp is older than the files that it was made from when
# these change.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e '.[demo]'
	touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e '.[test,lint]'
	touch $@

$(VENV)/.constraints: | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	touch $@

$(VENV)/.release: | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check build twine
	touch $@

$(LOWEST)/.test: pyproject.toml requirements/lowest.txt
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements/lowest.txt
	touch $@

$(TRAINERS)/.trainers: requirements/trainers-$(TOOL).txt
	$(PYTHON) -m venv $(TRAINERS)
	$(TRAINERS)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(TRAINERS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r $<
	touch $@

$(VENV)/.docs: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e '.[docs]'
	touch $@

clean:
	rm -rf .venv* build dist site runs .mypy_cache .ruff_cache .hypothesis
