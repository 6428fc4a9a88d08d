# make demo    generate a short video and show what was measured; PROMPT="a small blue ball"
# make test    every check: lint, format, types, tests
# make docs    the documentation as a site: build/site/index.html
# make bench   all that is timed, as an HTML page: at real size with a GPU, else at toy size
# make sanitize     the C++ ops' tests, checked for what they read, write and leave undefined
# make kernel-package   the ops as a repository for Hugging Face's kernels; PACKAGE=folder
# make experiment   teacher, diffusion and self forcing, trained and compared in the toy world
#
# Each sets up what it needs in .venv the first time. PYTHON=... names the interpreter to start
# from; if it has a PyTorch with CUDA that works here, that PyTorch is used.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python -m
# One stamp for each interpreter named, so that another PYTHON=... is not ignored in silence.
READY := $(VENV)/.ready-$(subst /,-,$(PYTHON))

.PHONY: demo test docs sanitize bench kernel-package experiment format clean

demo: $(READY)
	@$(RUN) bench demo $(if $(PROMPT),--prompt "$(PROMPT)")

# What needs a GPU runs on a pretended one first, where there is none. pytest comes last: its closing
# line says how many tests passed.
test: $(READY)
	@$(RUN) ruff check .
	@$(RUN) ruff format --check .
	@$(RUN) mypy
	@$(RUN) tests.pretended_cuda -m bench.verify
	@$(RUN) tests.pretended_cuda -m pytest -q -n 2 -m gpu $$(grep -l mark.gpu tests/test_*.py)
	@$(RUN) pytest -q -n 2 --dist worksteal

# The variable leaves out what Material says of its future at each start.
docs: $(READY)
	@NO_MKDOCS_2_WARNING=1 $(RUN) mkdocs build --strict

# In a copy, whose libraries take the place of the normal ones. Standard error is not captured: a
# sanitizer reports there and ends the process.
SANITIZED := build/sanitized
CHECKS := -fsanitize=address,undefined -fno-sanitize-recover=undefined
CPP_TESTS := norm residual rope sampler quant registration cpp cpp_fuzz
sanitize: PY := $(CURDIR)/$(VENV)/bin/python
sanitize: $(READY)
	@rm -rf $(SANITIZED) && mkdir -p $(SANITIZED)
	@cp -r setup.py pyproject.toml README.md LICENSE csrc sfkernels sfmodel bench experiments tests $(SANITIZED)
	@cd $(SANITIZED) && CXXFLAGS="$(CHECKS) -O0 -g" LDFLAGS="$(CHECKS)" \
	    $(PY) setup.py -q build_ext --inplace
	@cd $(SANITIZED) && sets="default $$(grep -oE 'avx2|avx512' /proc/cpuinfo | sort -u)" && \
	export FUZZ_CALLS=1000 ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	    LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" && \
	for ATEN_CPU_CAPABILITY in $$sets; do export ATEN_CPU_CAPABILITY; \
	    $(PY) -c 'import sys; from sfkernels import cpp; print(cpp.summary()); sys.exit(not cpp.LOADED)' && \
	    $(PY) -m pytest -q --capture=sys -k cpp $(wildcard $(CPP_TESTS:%=tests/test_%.py)) || exit 1; \
	done

bench: $(READY)
	@$(RUN) bench

PACKAGE := out/kernel-package
kernel-package:
	@$(PYTHON) tools/kernel_package.py "$(PACKAGE)"

experiment: $(READY)
	@$(RUN) bench experiment

format: $(READY)
	@$(RUN) ruff check --fix .
	@$(RUN) ruff format .

# Keeps .venv and the C++ ops built with it: rm -rf .venv to set up anew.
clean:
	rm -rf build dist out *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name $(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +

$(READY): pyproject.toml setup.py constraints.txt tools/setup_env.sh $(wildcard csrc/*)
	@tools/setup_env.sh "$(PYTHON)" $(VENV)
	@rm -f $(VENV)/.ready-* && touch $@
