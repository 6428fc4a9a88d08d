"""The examples run as a user runs them, at the size of a CPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from PIL import Image, ImageStat

from tests.live_server import serving
from tests.test_public import clone

ROOT = Path(__file__).parent.parent


def run(example: str, *beside: Path) -> str:
    """What an example says. beside: folders that its Python finds modules in."""
    path = os.pathsep.join(map(str, (ROOT, *beside)))
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / example], capture_output=True, text=True, cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path},
    )  # fmt: skip
    assert not done.returncode, done.stderr
    return done.stdout


def test_diffusers_before_and_after_one_line() -> None:
    said = run("diffusers_wan.py")
    found = re.search(r"diffusers [\d.]+ ms, patched [\d.]+ ms, .* difference ([\de.-]+) of", said)
    assert found and float(found[1]) < 1e-5
    assert "chunk 3: 12 latent frames so far, 6 of them in the ring" in said


def test_the_public_model_before_and_after_one_line(tmp_path: Path) -> None:
    clone(tmp_path)
    for package in ("wan", "wan/modules"):  # whose own import more than they need
        (tmp_path / package / "__init__.py").write_text("")
    attention = "from bench.public import _sdpa as attention"  # as flash-attn's would be
    (tmp_path / "wan/modules/attention.py").write_text(attention)
    said = run("causal_wan.py", tmp_path)
    found = re.search(r"public [\d.]+ ms, patched [\d.]+ ms, .* difference ([\de.-]+) of", said)
    assert found and 0 < float(found[1]) < 1e-5


def test_a_client_of_the_server(tmp_path: Path) -> None:
    with serving(tmp_path) as live:
        done = subprocess.run(
            [sys.executable, ROOT / "examples/serve_client.py", f"ws://{live.address}/stream"],
            capture_output=True, text=True, cwd=tmp_path,
        )  # fmt: skip
        assert not done.returncode, done.stderr
    frames = sorted(each.name for each in (tmp_path / "out/frames").iterdir())
    assert frames == [f"{i:05d}.jpg" for i in range(81)]
    (at,) = re.findall(r"'type': 'prompt', 'number': 1, 'frame': (\d+)", done.stdout)
    assert 41 <= int(at) <= 81
    for number, channel in ((int(at) - 1, 0), (80, 2)):
        with Image.open(tmp_path / f"out/frames/{number:05d}.jpg") as picture:
            red, _, blue = ImageStat.Stat(picture).mean
            assert (red, blue)[channel // 2] > (red, blue)[1 - channel // 2]
