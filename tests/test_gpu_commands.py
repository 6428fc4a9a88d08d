"""On a GPU: the commands of sfmodel and parts of the bench, at toy sizes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import stream, train
from bench.harness import Job, wrong
from bench.inputs import StreamInputs
from bench.ops import kernels
from experiments import rolling
from sfmodel.dit import DiT
from sfmodel.toy.vae import ToyVAE
from sfmodel.train import loop
from tests.test_bench_stream import SMALL, TEXT
from tests.tiny_runs import config, tiny

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda", 0)


@pytest.fixture
def sfmodel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs a command in an empty folder, the same one throughout a test."""
    pytest.importorskip("av")
    cli = pytest.importorskip("sfmodel.cli.main")
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["sfmodel", *arguments])
        cli.main()

    return run


def test_videos_and_latents(sfmodel: Callable[..., None]) -> None:
    Path("prompts.txt").write_text("a red ball\na blue ball\n")
    sfmodel("generate", "--prompt-file", "prompts.txt", "--frames", "9", "--output", "a.mp4")
    sfmodel("encode", ".", "--preset", "toy", "--output", "latents")
    sfmodel("encode", "prompts.txt", "--preset", "toy", "--output", "prompts")
    sfmodel("decode", "latents/a-0.safetensors", "--preset", "toy", "--output", "b.mp4")
    sfmodel("doctor")
    videos = [f"{name}.{kind}" for name in ("a-0", "a-1", "b") for kind in ("mp4", "png")]
    for name in (*videos, "latents/a-1.safetensors", "prompts/prompts.safetensors"):
        assert Path(name).stat().st_size > 0


def test_a_model_is_measured(sfmodel: Callable[..., None]) -> None:
    few = ["--videos", "16", "--frames", "4", "--trained", "3", "--window", "4"]
    sfmodel("evaluate", *few, "--output", "out")
    assert len(json.loads(Path("out/evaluation.json").read_text())["distance"]) == 4


def test_a_run_is_resumed(tmp_path: Path) -> None:
    logs = []
    with tiny():
        for name, stops in (("whole", (4,)), ("parts", (2, 4))):
            for steps in stops:
                run = config(tmp_path / name, "sf+dmd", steps=steps)
                loop.train(run, resume=steps != stops[0], device=GPU)
            lines = (tmp_path / name / "log.jsonl").read_text().splitlines()
            logs.append([json.loads(line) for line in lines])
    assert [line["loss"] for line in logs[0]] == [line["loss"] for line in logs[1]]
    assert all(line["peak_gib"] > 0 for line in logs[0])


def check_all(result: dict[str, Any]) -> None:
    """Nothing failed, nothing was left out, and what was to be a CUDA graph is one."""
    assert result["rows"] and not result["no_time_for"] and not wrong(result)
    for row in result["rows"]:
        assert "failed" not in row, row
        for name, entry in row["contestants"].items():
            assert "failed" not in entry and "note" not in entry, (row["case"], name, entry)


def job(only: str) -> Job:
    return Job(GPU, tiny=True, rounds=1, only=only)


def test_kernels() -> None:
    check_all(kernels.run(job("^qk_norm_rope_append")))


def test_training() -> None:
    check_all(train.run(job(r"^(TF|SF-1) \+ DMD( critic)?$")))


def test_extrapolation() -> None:
    check_all(rolling.run(job("^window of 6$")))


def test_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """In graphs and launched one by one; Gluon takes no float32, which the toy is in."""
    torch.manual_seed(0)
    model = DiT(SMALL.dit).eval().to(GPU)
    torch.nn.init.normal_(model.head.head.weight, std=0.1)
    inputs = StreamInputs(SMALL, model, TEXT.to(GPU), ToyVAE().to(GPU))
    monkeypatch.setattr(stream, "toy", lambda: inputs)
    those = [v for v in stream.variants(GPU) if v.name in ("triton, graph", "reference", "sdpa")]
    monkeypatch.setattr(stream, "variants", lambda *_: those)
    monkeypatch.setattr(stream, "CLIP", 4)
    check_all(stream.run(job("^chunk-wise$")))
