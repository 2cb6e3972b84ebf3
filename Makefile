# make demo    a fresh machine's first look: install, run the first lesson, print its table
# make test    everything that continuous integration checks
# make help    the other targets

VENV := .venv
BIN  := $(VENV)/bin
JOBS ?= 2
# The first Python from 3.11 on that can make environments; choose another: make demo PYTHON=/path/to/python3
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	$$p -c $(NEW_ENOUGH) 2>/dev/null && { echo $$p; break; }; done)
NEW_ENOUGH := 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))'
# Quiet unless it fails; what pip said is in .venv/install.log.
install = $(BIN)/python -m pip --disable-pip-version-check install $(1) > $(VENV)/install.log 2>&1 \
	|| { tail -n 20 $(VENV)/install.log; exit 1; }

.DELETE_ON_ERROR:
.PHONY: help demo test check export notebooks docs dist bench workflows lab clean

help:
	@echo "make demo       install into .venv, run the first lesson, print its results table"
	@echo "make test       everything that continuous integration checks (PYTEST='-k structure' for a part)"
	@echo "make check      structure, export and the tests of what changed since the last commit: two minutes"
	@echo "make docs       build the site from the notebooks into runs/site/html"
	@echo "make dist       source archive and wheel into dist/, checked"
	@echo "make export     clean the notebooks and write kdnb/ from them"
	@echo "make notebooks  run all notebooks with their defaults and keep the outputs (ONLY=10 for some)"
	@echo "make bench      time training, attacks, BSS, ABM, AFD beside the published codes, and how time grows with"
	@echo "                size (ONLY=bss for a file, BENCH='-k curves --rounds 2 --markdown' for rows, see --help)"
	@echo "make workflows  check the workflow files"
	@echo "make lab        run the first lesson in JupyterLab in a headless browser, take a picture"
	@echo "make clean      remove what running and building left; .venv stays (remove it by hand)"

# ---- environments: a stamp per set of extras, renewed when the requirements change

$(VENV)/.made:
	@test -n "$(PYTHON)" || { echo "kdnb needs Python >= 3.11 with venv; found none (name one: make $(MAKECMDGOALS) PYTHON=/path/to/python3)" >&2; exit 1; }
	@"$(PYTHON)" -c $(NEW_ENOUGH) 2>/dev/null || { echo "kdnb needs Python >= 3.11 with venv; $(PYTHON) is not" >&2; exit 1; }
	@echo "making $(VENV) with $$("$(PYTHON)" -V)"
	@"$(PYTHON)" -m venv --clear $(VENV)
	@touch $@

$(VENV)/.run-ok: $(VENV)/.made settings.ini setup.py pyproject.toml
	@echo "installing kdnb[run] into $(VENV) (PyTorch is large: minutes the first time)"
	@$(call install,-e '.[run]')
	@touch $@

# torchattacks, an oracle in tests, would pin an old requests: it comes without what it asks for.
$(VENV)/.dev-ok: $(VENV)/.made settings.ini setup.py pyproject.toml
	@echo "installing kdnb[dev] into $(VENV) (PyTorch is large: minutes the first time)"
	@$(call install,-e '.[dev]')
	@$(call install,--no-deps 'torchattacks==3.5.1')
	@touch $(VENV)/.run-ok $@

$(VENV)/.lab-ok: $(VENV)/.dev-ok
	@$(call install,-e '.[lab]')
	@touch $@

$(VENV)/.dist-ok: $(VENV)/.made
	@$(call install,'build>=1.2' 'twine>=6')
	@touch $@

$(VENV)/.workflows-ok: $(VENV)/.made
	@$(call install,'check-jsonschema>=0.33' 'zizmor>=1.20')
	@touch $@

# ---- what a visitor wants; small networks gain nothing from more than two threads

demo: $(VENV)/.run-ok
	@mkdir -p runs
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-2} $(BIN)/kdnb run 10_kd -o runs/10_kd.ipynb

# Cheapest first; the last line is pytest's summary. OMP_NUM_THREADS=1 because JOBS notebooks run side by side.
LAST  := tests/test_notebooks.py tests/test_wheel.py
TESTS := tests/test_structure.py $(filter-out tests/test_structure.py $(LAST),$(sort $(wildcard tests/test_*.py))) $(LAST)

test: $(VENV)/.dev-ok
	@OMP_NUM_THREADS=1 JOBS=$(JOBS) $(BIN)/python -m pytest -q --durations=10 --durations-min=5 \
		$(TESTS) $(PYTEST)

# What a contributor runs before a commit; `make test` is everything.
check: export
	@OMP_NUM_THREADS=1 JOBS=$(JOBS) $(BIN)/python -m pytest -q $$($(BIN)/python tests/changed.py) $(PYTEST)

# ---- what an author wants

# papermill gives every cell an empty list of tags, and nbdev_clean keeps tags.
define DROP_EMPTY_TAGS
import json, pathlib
for path in pathlib.Path("nbs").glob("*.ipynb"):
    nb = json.loads(path.read_text(encoding="utf-8"))
    for cell in nb["cells"]:
        if cell["metadata"].get("tags") == []:
            del cell["metadata"]["tags"]
    text = json.dumps(nb, sort_keys=True, indent=1, ensure_ascii=False) + "\n"
    if text != path.read_text(encoding="utf-8"):
        path.write_text(text, encoding="utf-8")
endef
export DROP_EMPTY_TAGS
clean_notebooks = $(BIN)/python -c "$$DROP_EMPTY_TAGS" && env -u IN_TEST $(BIN)/nbdev_clean

export: $(VENV)/.dev-ok
	@$(clean_notebooks)
	@env -u IN_TEST $(BIN)/nbdev_export

# All of them run before any is written back.
notebooks: export
	@rm -rf runs/fresh && mkdir -p runs/fresh
	@cd nbs && ls $(ONLY)*.ipynb | OMP_NUM_THREADS=1 xargs -P $(JOBS) -I{} sh -c ' \
		start=$$(date +%s); \
		if ../$(BIN)/python -m papermill {} ../runs/fresh/{} -k python3 --no-progress-bar > ../runs/fresh/{}.log 2>&1; \
		then echo "ok   {} $$(($$(date +%s) - start)) s"; \
		else echo "FAIL {}"; tail -n 25 ../runs/fresh/{}.log; exit 1; fi'
	@cp runs/fresh/*.ipynb nbs/
	@$(clean_notebooks)

docs: $(VENV)/.dev-ok
	@$(BIN)/python docs/site.py runs/site
	@echo "the site: runs/site/html/index.html"

dist: $(VENV)/.dist-ok
	@rm -rf dist build
	@$(BIN)/python -m build --outdir dist . > $(VENV)/build.log 2>&1 || { tail -n 20 $(VENV)/build.log; exit 1; }
	@$(BIN)/twine check --strict dist/*
	@ls -l dist

# One file after the other, each alone: two at once would slow each other down.
bench: $(VENV)/.dev-ok
	@for file in tests/bench_$(or $(ONLY),*).py; do $(BIN)/python $$file $(BENCH) || exit 1; done

workflows: $(VENV)/.workflows-ok
	@$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	@$(BIN)/zizmor --offline --quiet .github/workflows

# Needs a Chromium on the PATH.
lab: $(VENV)/.lab-ok
	@mkdir -p runs
	@$(BIN)/python tests/lab_run.py nbs/$(or $(ONLY),10_kd).ipynb runs/lab.png

clean:
	@rm -rf runs build dist kdnb.egg-info .pytest_cache .ruff_cache .hypothesis
	@find . -name .venv -prune -o -name __pycache__ -prune -exec rm -rf {} +
	@find nbs -name .ipynb_checkpoints -prune -exec rm -rf {} +
