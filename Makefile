# make demo    generate a short video and show what was measured; PROMPT="a small blue ball"
# make test    every check: lint, format, types, tests
# make bench   all that is timed, as an HTML page: at real size with a GPU, else at toy size
# make experiment   teacher, diffusion and self forcing, trained and compared in the toy world
#
# Each sets up what it needs in .venv the first time. PYTHON=... names the interpreter to start
# from; if it has a PyTorch with CUDA that works here, that PyTorch is used.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python -m
# One stamp for each interpreter named, so that another PYTHON=... is not ignored in silence.
READY := $(VENV)/.ready-$(subst /,-,$(PYTHON))

.PHONY: demo test bench experiment format clean

demo: $(READY)
	@$(RUN) bench demo $(if $(PROMPT),--prompt "$(PROMPT)")

# pytest comes last: its closing line says how many tests passed.
test: $(READY)
	@$(RUN) ruff check .
	@$(RUN) ruff format --check .
	@$(RUN) mypy
	@$(RUN) pytest -q -n 2 --dist worksteal

bench: $(READY)
	@$(RUN) bench

experiment: $(READY)
	@$(RUN) bench experiment

format: $(READY)
	@$(RUN) ruff check --fix .
	@$(RUN) ruff format .

# Keeps .venv: rm -rf .venv to set up anew.
clean:
	rm -rf build dist out *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name $(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +

$(READY): pyproject.toml setup.py constraints.txt tools/setup_env.sh
	@tools/setup_env.sh "$(PYTHON)" $(VENV)
	@rm -f $(VENV)/.ready-* && touch $@
