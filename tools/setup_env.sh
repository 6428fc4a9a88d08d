#!/bin/sh
# Usage: tools/setup_env.sh PYTHON VENV. Creates the virtual environment VENV, or completes the one
# that is there, with this package, its extras and the tools, and builds the C++ ops if there is a
# compiler. Called by the Makefile.
set -eu
python=$1 venv=$2

say() { echo "setup: $*"; }
fail() { echo "setup: $*" >&2; exit 1; }

command -v "$python" >/dev/null || fail "no '$python' found; name an interpreter: make PYTHON=/path/to/python3"
version=$("$python" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])') || fail "'$python' does not run"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    fail "'$python' is Python $version, 3.10 or newer is needed; name another: make PYTHON=/path/to/python3"
"$python" -c 'import venv, ensurepip' 2>/dev/null ||
    fail "'$python' has no venv module; install it (Debian, Ubuntu: apt install python3-venv) or set PYTHON"

# A PyTorch with CUDA that already works on this machine is used as it is, and never replaced: it
# fits the driver, and its download is gigabytes. Anything older than pyproject.toml asks for is not.
torch_dir=$("$python" -c '
import os, torch
recent = tuple(int(n) for n in torch.__version__.split(".")[:2]) >= (2, 11)
if recent and torch.version.cuda and torch.cuda.is_available():
    print(os.path.dirname(os.path.dirname(torch.__file__)))
' 2>/dev/null) || torch_dir=
[ -n "$torch_dir" ] && shared=true || shared=false

# What is there is completed, unless it was made from another Python or in the other way.
say "virtual environment $venv (Python $version)"
clear=--clear
grep -qs "^version = $version" "$venv/pyvenv.cfg" &&
    grep -qs "^include-system-site-packages = $shared" "$venv/pyvenv.cfg" && clear=
if $shared; then
    "$python" -m venv $clear --system-site-packages "$venv"
    # --system-site-packages stops at the base interpreter. The .pth file also reaches a PyTorch
    # that lives in a virtual environment or in the user's own folder.
    site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    echo "$torch_dir" >"$site/existing_torch.pth"
    # Only the tools that judge the source are pinned: other pins could contradict the existing
    # PyTorch's needs.
    grep -E '^(pytest|ruff|mypy)==' constraints.txt >"$venv/constraints.txt"
    set -- -c "$venv/constraints.txt"
    say "using the PyTorch with CUDA found in $torch_dir; installing the rest"
else
    "$python" -m venv $clear "$venv"
    set -- -c constraints.txt
    index=https://download.pytorch.org/whl/cpu
    if [ "$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null &&
        timeout 10 "$python" -c "import urllib.request as r; r.urlopen('$index/torch/', timeout=5)" 2>/dev/null; then
        # The plain wheel for Linux brings gigabytes of CUDA libraries, useless without a driver.
        set -- "$@" --extra-index-url "$index"
    fi
    say "installing PyTorch and the tools (takes minutes the first time)"
fi
# -qq: errors only.
install() { "$venv/bin/python" -m pip install -qq --disable-pip-version-check "$@"; }
# PyTorch comes first and builds are not isolated: the C++ ops are compiled with the PyTorch that
# they run in.
{ install "$@" 'torch>=2.11' 'setuptools>=77' && install "$@" --no-build-isolation -e '.[dev]'; } ||
    fail "the installation failed; the lines above say why. Run the same command to try again"

if $shared; then
    "$venv/bin/python" -c "import torch, sys; sys.exit(not torch.__file__.startswith('$torch_dir/'))" ||
        fail "pip replaced the PyTorch found in $torch_dir; remove $venv and update that PyTorch"
fi
say "ready; $("$venv/bin/python" -c 'from sfkernels import cpp; print(cpp.summary())')"
