# Two commands are all a newcomer needs:  make quickstart  and  make test.  Works with GNU make 3.81.
# Each first brings the environment up to date, which costs milliseconds when it already is; see scripts/setup.sh.

VENV ?= .venv
export VENV
BIN = "$(VENV)"/bin
LINE_CEILING = 15000

.PHONY: help setup quickstart test torture check format bench

help:
	@echo "make quickstart   set up, train a small model with every part in it on this machine (about 6 minutes), write a report"
	@echo "make test         set up, run the whole test suite (about 4 minutes on 2 cores)"
	@echo
	@echo "make setup        only make $(VENV) and install what constraints.txt pins"
	@echo "make check        formatting, lint, types, import directions, line count"
	@echo "make torture      a thousand kill -9 against everything that writes files, 5 minutes of 64 clients (about 16 minutes)"
	@echo "make format       rewrite the code in the form that 'make check' asks for"
	@echo "make bench        measure speed against named peers (bench/)"
	@echo
	@echo "make setup TORCH=cpu|cuda|auto   which PyTorch: auto takes cuda where there is an NVIDIA driver"
	@echo "make setup PYTHON=python3.12     which interpreter (3.11 to 3.14)"
	@echo "make setup VENV=folder           where the environment goes"

setup:
	@sh scripts/setup.sh

quickstart: setup
	@$(BIN)/byrote quickstart

test: setup
	@$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

torture: setup
	@$(BIN)/python -m pytest -m torture

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_layers.py
	@find byrote -type f \( -name '*.py' -o -name '*.[ch]' -o -name '*.cpp' -o -name '*.html' -o -name '*.css' -o -name '*.js' \) \
	    -exec cat {} + | awk 'END { printf "byrote/: %d lines of at most $(LINE_CEILING)%s\n", NR, NR > $(LINE_CEILING) ? " - TOO MANY" : "" }'

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: setup
	@for script in bench/bench_*.py; do \
	    [ -f "$$script" ] || { echo "bench/ holds no bench_*.py yet"; exit 1; }; \
	    module=$${script%.py}; echo "== $$script"; $(BIN)/python -m bench.$${module##*/} || exit 1; \
	done
