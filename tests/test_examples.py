"""The examples run as a user runs them, at the size of a CPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run(example: str, *args: str) -> str:
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / example, *args], capture_output=True, text=True,
        cwd=ROOT, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert not done.returncode, done.stderr
    return done.stdout


def test_diffusers_before_and_after_one_line() -> None:
    said = run("diffusers_wan.py")
    found = re.search(r"diffusers [\d.]+ ms, patched [\d.]+ ms, .* difference ([\de.-]+) of", said)
    assert found and float(found[1]) < 1e-5
    assert "chunk 3: 12 latent frames so far, 6 of them in the ring" in said
