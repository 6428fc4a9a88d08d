"""What a figure was measured on."""

from __future__ import annotations

import platform
from typing import Any

import torch


def machine(device: torch.device | str) -> dict[str, Any]:
    """Device, versions and threads, to stand beside every measured figure."""
    device = torch.device(device)
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        threads = torch.get_num_threads()
        name = f"{_cpu_name()}, {threads} thread{'s' if threads > 1 else ''}"
    return {
        "device": name,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _triton_version(),
    }


def said(machine: dict[str, Any]) -> str:
    """One line for a table or a figure."""
    return f"{machine['device']}, PyTorch {machine['torch']}, Triton {machine['triton']}"


def _cpu_name() -> str:
    with open("/proc/cpuinfo") as lines:
        for line in lines:
            if line.startswith("model name"):
                return " ".join(line.split(":", 1)[1].split())
    return platform.machine()


def _triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return str(triton.__version__)
