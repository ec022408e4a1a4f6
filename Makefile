VENV ?= .venv
PYTHON ?= python3
INSTALLED = $(VENV)/.installed
# Written by every build of the native library.
BUILT = kdkernels/_build_info.json

.PHONY: test test-torches sanitize demo lint native clean

# A file at a time on every core, up to eight.
test: $(BUILT)
	$(VENV)/bin/python -m pytest --numprocesses logical --maxprocesses 8 --dist loadfile

# The library as it is built here, on another torch.
test-torches: $(BUILT)
	PYTHON=$(VENV)/bin/python scripts/second_torch.sh

# The native tests on a library that reports bad addresses and undefined behaviour.
sanitize: $(BUILT)
	PYTHON=$(VENV)/bin/python scripts/sanitize.sh

demo: $(BUILT)
	$(VENV)/bin/kdkernels demo

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/yamllint --strict .github .yamllint.yaml
	$(VENV)/bin/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(VENV)/bin/zizmor --offline --quiet .github/workflows

# By name, so that what cannot be compiled is an error; `make test` goes on without it.
native: $(INSTALLED)
	KDKERNELS_BUILD=$${KDKERNELS_BUILD:-cpu} $(VENV)/bin/python setup.py --quiet build_ext --inplace

$(BUILT): setup.py $(shell find csrc -type f) | $(INSTALLED)
	$(VENV)/bin/python setup.py --quiet build_ext --inplace

# The pinned development set; made again only when what it is made from changes. torch comes first, as what the library is built with.
$(INSTALLED): pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt torch numpy setuptools ninja
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[all,dev]'
	touch $(INSTALLED)

clean:
	rm -rf $(VENV) .venv-newest build dist *.egg-info kdkernels/_C_* $(BUILT)
