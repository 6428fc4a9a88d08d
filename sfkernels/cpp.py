"""The launchers in C++ for CPU tensors (csrc/), by the names of those in sfkernels.gpu.

They are in a library for each instruction set, built with the package; the one that fits this
processor is loaded with this module. `MISSING` says why there is none, and is empty if there is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

MISSING = ""


def _load() -> str:
    """Loads the library. Returns why it could not be."""
    # As PyTorch's own kernels, and like those set by ATEN_CPU_CAPABILITY.
    capability = torch.backends.cpu.get_cpu_capability().lower()
    folder = Path(__file__).parent
    for name in (capability, "default"):
        found = sorted(folder.glob(f"_cpp_{name}.*"))
        if found:
            break
    else:
        return "they are not built: docs/cpu.md says how"
    try:
        torch.ops.load_library(found[0])
    except OSError as error:
        return f"{found[0].name} does not load: {error.__cause__ or error}"
    return ""


def __getattr__(launcher: str) -> Any:
    if launcher.startswith("_"):
        raise AttributeError(launcher)
    op = getattr(torch.ops.sfkernels_cpp, launcher).default
    globals()[launcher] = op
    return op


MISSING = _load()
