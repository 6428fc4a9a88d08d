"""The demo's arithmetic, its refusal to time what is wrong, and its pictures."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bench import figures
from experiments import demo, rolling
from sfkernels import BlockLayout
from sfmodel.config import PRESETS
from sfmodel.cost import pass_flops, rolling_flops
from sfmodel.dit import DiT
from sfmodel.machine import machine
from sfmodel.pretrained import load_toy
from tests.test_rolling import SMALL, small_model


@pytest.fixture
def model() -> DiT:
    return small_model()


@torch.no_grad()
def test_flops_are_those_pytorch_counts(model: DiT) -> None:
    x, t = torch.randn(1, 3, 4, 8, 8), model.modulation(torch.tensor(500.0))
    cache = model.new_cache(1, 6, SMALL.grid)
    model.set_text(cache, torch.zeros(1, 1, 32))
    cache.commit(3)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(x, t, None, cache=cache)
    assert counter.get_total_flops() == pass_flops(SMALL.dit, 12, 12 * 24)


def test_flops_of_the_paper_s_model() -> None:
    """By hand: 30 layers of d = 1536, 4680 queries over 32,760 keys, five passes: 141 TFLOP of
    self-attention and 58.5 of matrix products, 2.2 of cross-attention."""
    config, n = PRESETS["wan-1.3b"].dit, 1560
    five = 5 * pass_flops(config, 3 * n, 3 * n * 21 * n)
    assert five / 1e12 == pytest.approx(141.3 + 58.5 + 2.2, rel=0.01)
    flops = rolling_flops(config, n, 21, 3, 4)
    assert flops["ring cache"] == five
    window = BlockLayout((18, 3), n)
    assert flops["recompute window"] == 4 * pass_flops(config, 21 * n, window.pairs)


def test_report_and_figure(
    model: DiT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    toy, codec, text = load_toy()
    prompt = "a small red ball"
    streamed = demo.run_stream(toy, codec, text([prompt]), prompt, 12, 0, tmp_path)
    assert (tmp_path / "video.mp4").exists() and (tmp_path / "video.png").exists()
    assert streamed["cache_mib"] == pytest.approx(2 * 4 * 128 * 4 * (9 * 4 + 16) / 2**20)
    compared = [
        rolling.compare(model, SMALL, torch.zeros(1, 1, 32), batch=b, chunks=1) for b in (1, 2)
    ]
    result = {"machine": machine("cpu"), "stream": streamed, "rolling": compared}
    json.dumps(result)
    demo.report(result, Console(width=110))
    assert "recompute cache" in capsys.readouterr().out
    figures.save(demo.figure(result), tmp_path / "figure.png")
    with Image.open(tmp_path / "figure.png") as figure:
        assert figure.width > 1000


@pytest.mark.parametrize("command", ["kernels", "--quick", "cpu", "demo"])
def test_a_library_that_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setattr(sys, "argv", ["bench", command])
    with pytest.raises(SystemExit) as exit:
        runpy.run_module("bench", run_name="__main__")
    assert exit.value.code == 2
    assert "needs rich, not installed: pip install 'sfkernels[" in capsys.readouterr().err
