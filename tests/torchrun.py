"""Commands on several ranks of this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def torchrun(
    count: int, *arguments: str | Path, cwd: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    """Runs `torchrun --nproc-per-node count …` to its end, with one thread a rank."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, str(count), *map(str, arguments)],
        capture_output=True, text=True, env=environment, timeout=200, cwd=cwd,
    )  # fmt: skip
