"""The libraries that sfmodel needs beside those that come with sfkernels."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec

# By the extra of the package that installs them, under the names that they are imported by.
EXTRAS = {
    "model": ("safetensors", "tyro", "rich", "av", "PIL", "matplotlib"),
    "bench": ("rich",),  # without matplotlib there are no figures
    "serve": ("starlette", "uvicorn", "websockets", "prometheus_client"),
    "trackers": ("wandb", "tensorboard"),
}


def require(program: str, extra: str) -> None:
    """Ends the program with one sentence and exit code 2 where a library is not installed: before
    any of them is imported, and not in the middle of what needs it."""
    missing = [name for name in EXTRAS[extra] if find_spec(name) is None]
    if missing:
        print(_sentence(program, missing, extra), file=sys.stderr)
        sys.exit(2)


def check_installed(setting: str, name: str, extra: str) -> None:
    """Raises ValueError with one sentence where a library that a setting needs is not there."""
    if find_spec(name) is None:
        raise ValueError(_sentence(setting, [name], extra))


@contextmanager
def needed() -> Iterator[None]:
    """`with needed(): import av` raises ImportError with one sentence where a library of the extra
    `model` is not installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        name = str(error.name).partition(".")[0]
        if name not in EXTRAS["model"]:
            raise
        raise ImportError(_sentence("sfmodel", [name], "model"), name=name) from None


def _sentence(program: str, missing: Iterable[str], extra: str) -> str:
    names = ", ".join("pillow" if name == "PIL" else name for name in missing)
    return f"{program}: needs {names}, not installed: pip install 'sfkernels[{extra}]'"
