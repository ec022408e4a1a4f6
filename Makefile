VENV ?= .venv
PYTHON ?= python3
INSTALLED = $(VENV)/.installed

.PHONY: test demo lint clean

test: $(INSTALLED)
	$(VENV)/bin/python -m pytest

demo: $(INSTALLED)
	$(VENV)/bin/kdkernels demo

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/yamllint --strict .github .yamllint.yaml
	$(VENV)/bin/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(VENV)/bin/zizmor --offline --quiet .github/workflows

# The pinned development set; made again only when what it is made from changes.
$(INSTALLED): pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[all,dev]'
	touch $(INSTALLED)

clean:
	rm -rf $(VENV) build dist *.egg-info
