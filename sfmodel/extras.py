"""The libraries that the commands need beside those that come with sfkernels."""

from __future__ import annotations

import sys
from importlib.util import find_spec

# By the extra of the package that installs them, under the names that they are imported by.
EXTRAS = {
    "model": ("safetensors", "tyro", "rich", "av", "PIL", "matplotlib"),
    "bench": ("rich",),  # without matplotlib there are no figures
}


def require(program: str, extra: str) -> None:
    """Ends the program with one sentence and exit code 2 where a library is not installed: before
    any of them is imported, and not in the middle of what needs it."""
    missing = [name for name in EXTRAS[extra] if find_spec(name) is None]
    if missing:
        names = ", ".join("pillow" if name == "PIL" else name for name in missing)
        print(
            f"{program}: needs {names}, not installed: pip install 'sfkernels[{extra}]'",
            file=sys.stderr,
        )
        sys.exit(2)
