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

# The pinned development set; made again only when what it is made from changes.
$(INSTALLED): pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[all,dev]'
	touch $(INSTALLED)

clean:
	rm -rf $(VENV) build dist *.egg-info
