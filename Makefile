# Flux Glassbox: `make edit`, `make test`, `make serve`, `make bench`. Each sets up what it needs;
# a second run installs nothing. Needs Python 3.11 to 3.13, git, make; the tests also Chromium and
# Node.js. COMFYUI_PATH=folder uses that ComfyUI, else ComfyUI 0.30.0 is fetched.

PYTHON ?= python3
PORT ?= 8188
COMFYUI_ARGS ?= --cpu

VENV := .venv/bin
# Only what is given to make counts, not an environment variable that happens to have the name.
# $(value) keeps a dollar sign in the words of the user.
ifeq ($(origin IMAGE),command line)
export GLASSBOX_IMAGE := $(value IMAGE)
endif
ifeq ($(origin PROMPT),command line)
export GLASSBOX_PROMPT := $(value PROMPT)
endif

.PHONY: help setup edit serve bench test lint js pytest clean

help:
	@echo 'make edit [IMAGE=picture.png] [PROMPT="make the circle red"]   edit a picture, into output/'
	@echo 'make serve [PORT=8188]   ComfyUI with this pack, in the browser'
	@echo 'make test                lint, types and every test'
	@echo 'make bench               the benchmark table'
	@echo 'COMFYUI_ARGS= on edit and serve lets ComfyUI use a GPU.'

setup:
	@$(PYTHON) tests/graph/prepare.py

edit: setup
	@$(VENV)/python -m tests.graph.run_edit --image="$$GLASSBOX_IMAGE" \
		--prompt="$$GLASSBOX_PROMPT" --comfyui="$(COMFYUI_ARGS)"

serve: setup
	@$(VENV)/python -m tests.graph.run_serve --port=$(PORT) --comfyui="$(COMFYUI_ARGS)"

bench: setup
	@$(VENV)/python tests/bench/run.py

# One stage after the other; the first that fails ends it.
test: setup
	@$(MAKE) --no-print-directory lint
	@$(MAKE) --no-print-directory js
	@$(MAKE) --no-print-directory pytest

lint: setup
	@echo '== ruff'
	@$(VENV)/ruff check .
	@$(VENV)/ruff format --check .
	@echo '== basedpyright'
	@$(VENV)/basedpyright --level error

js: setup
	@echo '== node --test'
	@node --test $(wildcard tests/js/*.js tests/js/*.mjs)

pytest: setup
	@echo '== pytest'
	@HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 $(VENV)/python -m pytest

clean:
	rm -rf .venv .cache output
