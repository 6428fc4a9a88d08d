"""The launchers in C++ for CPU tensors (csrc/), by the names of those in sfkernels.gpu.

They are in a library for each instruction set, built with the package; the one that fits this
processor is loaded with this module. `LOADED` names its instruction set; `MISSING` says why there
is none, and is empty if there is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def summary() -> str:
    """Implementation that runs on a CPU, in one line."""
    return f"C++ ops: {LOADED or f'none: {MISSING}; PyTorch computes in their place'}"


def _load() -> tuple[str, str]:
    """Loads the library. Returns its instruction set, or else why there is none."""
    # As PyTorch's own kernels, and like those set by ATEN_CPU_CAPABILITY.
    capability = torch.backends.cpu.get_cpu_capability()
    for name in (capability, "DEFAULT"):
        for library in sorted(Path(__file__).parent.glob(f"_cpp_{name.lower()}.*")):
            try:
                torch.ops.load_library(library)
            except OSError as error:
                reason = str(error.__cause__ or error).partition("\n")[0]
                reason = reason.removeprefix(f"{library}: ")
                # Of another machine's library Linux says only that there is no such file.
                return "", f"{library.name}, perhaps another machine's, does not load: {reason}"
            return name, ""
    return "", "they are not built: docs/cpu.md says how"


def __getattr__(launcher: str) -> Any:
    if launcher.startswith("_"):
        raise AttributeError(launcher)
    op = getattr(torch.ops.sfkernels_cpp, launcher).default
    globals()[launcher] = op
    return op


LOADED, MISSING = _load()
