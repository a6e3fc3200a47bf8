# Each target is one command on a fresh machine: it makes its own environment and installs what it needs.
# Once that has happened, nothing here touches the network until pyproject.toml or tests/package-lock.json changes.

PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
OFFLINE := HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1
AXE := tests/node_modules/.package-lock.json
CODE := $(wildcard finelip_diffusion pipelines train app examples benchmarks)

.DEFAULT_GOAL := help
.PHONY: help demo app space test test-oldest test-install versions docs pictures quality lint types style clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1@\2/p' $(firstword $(MAKEFILE_LIST)) | column -t -s '@' 2>/dev/null \
		|| sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1 - \2/p' $(firstword $(MAKEFILE_LIST))

demo: $(VENV)/.installed-core ## draw one long prompt with the bundled model, into demo.png
	$(OFFLINE) $(PY) examples/demo.py

app: $(VENV)/.installed-app ## open the page on http://127.0.0.1:7860
	$(OFFLINE) $(PY) app/app.py

space: ## gather a Hugging Face Space in build/space
	rm -rf build/space
	mkdir -p build/space
	cp -r app/. build/space/
	cp -r finelip_diffusion build/space/
	find build/space -name __pycache__ -type d -prune -exec rm -rf {} +

test: $(VENV)/.installed-dev $(AXE) ## run the test suite
	$(OFFLINE) $(PY) -m pytest --numprocesses 2 --dist loadfile --junitxml build/tests/newest.xml
	$(PY) tests/versions.py record newest build/tests/newest.xml

test-oldest: $(AXE) ## run the test suite on the oldest versions that are supported, in .venv-oldest
	$(MAKE) VENV=.venv-oldest .venv-oldest/.installed-oldest
	$(OFFLINE) .venv-oldest/bin/python -m pytest --numprocesses 2 --dist loadfile --junitxml build/tests/oldest.xml
	.venv-oldest/bin/python tests/versions.py record oldest build/tests/oldest.xml

test-install: $(VENV)/.installed-dev ## run each block of the documentation after its own install line (needs the network once)
	$(PY) -m pytest -m install tests/test_install.py

versions: ## write what the suite last ran on into docs/versions.md
	$(PYTHON) tests/versions.py write

docs: $(VENV)/.installed-dev ## build the documentation's site in build/site; any broken link fails
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --quiet

pictures: $(VENV)/.installed-dev ## draw the page's example again, and take the documentation's pictures of the page
	$(OFFLINE) $(PY) app/take_pictures.py

quality: lint types ## check lint, format and types; change nothing

lint: $(VENV)/.installed-dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: $(VENV)/.installed-dev
	$(PY) -m mypy $(CODE)

style: $(VENV)/.installed-dev ## fix what lint and format can fix
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean: ## remove the environment, the caches and what was built
	rm -rf $(VENV) .venv-oldest .mypy_cache .ruff_cache .pytest_cache build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The environment. A failed `venv` leaves a folder without pip behind: it is taken away again, so that the next try starts clean.
$(PY):
	@command -v $(PYTHON) >/dev/null || { echo "make: no '$(PYTHON)' found; install Python 3.10 or newer, or name it: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "make: $$($(PYTHON) --version) is too old; Python 3.10 or newer is needed: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
		|| { echo "make: '$(PYTHON) -m venv' cannot install pip here; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/.installed-core: pyproject.toml | $(PY)
	$(PY) -m pip install --disable-pip-version-check -e .
	@touch $@

$(VENV)/.installed-app: pyproject.toml | $(PY)
	$(PY) -m pip install --disable-pip-version-check -e '.[app]'
	@touch $(VENV)/.installed-core $@

$(VENV)/.installed-dev: pyproject.toml | $(PY)
	$(PY) -m pip install --disable-pip-version-check -e '.[dev]'
	@touch $(VENV)/.installed-core $(VENV)/.installed-app $@

# axe-core, which the page's tests ask about accessibility.
$(AXE): tests/package-lock.json
	@if command -v npm >/dev/null; then \
		npm ci --prefix tests --ignore-scripts --no-audit --no-fund --loglevel error && touch $@; \
	else \
		echo "make: npm is missing, so that tests of accessibility are skipped; on Debian and Ubuntu: apt install npm" >&2; \
	fi

# pip takes the newest that fits, uv can take the oldest: the lower bounds in pyproject.toml.
$(VENV)/.installed-oldest: pyproject.toml | $(PY)
	$(PY) -m pip install --disable-pip-version-check uv
	$(PY) -m uv pip install --python $(PY) --resolution lowest-direct -e '.[dev]'
	@touch $@
