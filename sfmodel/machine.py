"""Description of the machine that a figure was measured on, and of the state that it was in."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

# What nvidia-smi is asked for, and the name it gets here.
STATE = {
    "clocks.sm": "sm_mhz",
    "clocks.mem": "memory_mhz",
    "temperature.gpu": "celsius",
    "power.draw": "watts",
}


def machine(device: torch.device | str) -> dict[str, Any]:
    """Device, versions, date and threads, to stand beside every measured figure."""
    device = torch.device(device)
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        more = {"driver": next(iter(_smi(device, "driver_version")), "") or None}
    else:
        threads = torch.get_num_threads()
        name = f"{_cpu_name()}, {threads} thread{'s' if threads > 1 else ''}"
        more = {}
    return {
        "device": name,
        "kind": device.type,
        **more,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "sfkernels": _version("sfkernels"),
        "commit": commit(Path(__file__).parent),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def describe(machine: dict[str, Any]) -> str:
    """One line for a table or a figure."""
    return f"{machine['device']}, PyTorch {machine['torch']}, Triton {machine['triton']}"


def state(device: torch.device) -> dict[str, float]:
    """Before and after: clocks in MHz, °C and W of a GPU, the load of a CPU (processes that want
    to run). What cannot be read is left out."""
    if device.type != "cuda":
        return {"load": os.getloadavg()[0]}
    found = {}
    for name, value in zip(STATE.values(), _smi(device, *STATE), strict=False):
        try:
            found[name] = float(value)
        except ValueError:
            continue
    return found


def describe_state(before: dict[str, float], after: dict[str, float]) -> str:
    """One line of what changed while it was measured."""
    units = {"sm_mhz": "SM MHz", "memory_mhz": "memory MHz", "celsius": "°C", "watts": "W",
             "load": "load average"}  # fmt: skip
    both = [name for name in units if name in before and name in after]
    return ", ".join(f"{before[n]:.3g} → {after[n]:.3g} {units[n]}" for n in both)


def _smi(device: torch.device, *queries: str) -> list[str]:
    """nvidia-smi's answers, "" where it knows none; none where it is not installed, does not answer
    or does not know this GPU."""
    which = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    options = [f"--query-gpu={','.join(queries)}", "--format=csv,noheader,nounits", f"--id={which}"]
    try:
        out = subprocess.run(
            ["nvidia-smi", *options], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            errors="replace", timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return []
    fields = [field.strip() for field in out.stdout.partition("\n")[0].split(",")]
    return ["" if field.startswith("[") else field for field in fields]  # as "[N/A]"


def commit(folder: Path) -> str | None:
    """Commit of the checkout that a folder lies in, with a + where it was changed."""
    here = ["git", "-C", str(folder)]
    describe = ["describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        out = subprocess.run(
            [*here, *describe], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return out.stdout.strip()


def _cpu_name() -> str:
    with open("/proc/cpuinfo") as lines:
        for line in lines:
            if line.startswith("model name"):
                return " ".join(line.split(":", 1)[1].split())
    return platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
