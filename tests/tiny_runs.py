"""Runs of the trainer that take about a second: their settings, and what they leave."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from sfmodel.config import PRESETS
from sfmodel.dit import DiT
from sfmodel.train import report
from sfmodel.train.config import TrainConfig
from sfmodel.weights import checkpoint

TOY = PRESETS["toy"]
PLOT, SAMPLE = report.plot, report.Report.sample
TINY = replace(TOY, dit=replace(TOY.dit, dim=64, heads=1, ffn_dim=64, layers=1))


@contextmanager
def tiny() -> Iterator[None]:
    """Context in which the toy model is tiny and no pictures are drawn, which takes longer."""
    plot, sample = mock.patch.object(report, "plot"), mock.patch.object(report.Report, "sample")
    with mock.patch.dict(PRESETS, toy=TINY), plot, sample:
        yield


def weights(path: Path, seed: int) -> Path:
    """Weights of a tiny model whose flow is not zero."""
    if not path.exists():
        generator = torch.Generator().manual_seed(seed)
        model = DiT(TINY.dit)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.1, generator=generator)
        checkpoint.save(model, path, TINY.dit)
    return path


def config(folder: Path, recipe: str = "tf", **change: Any) -> TrainConfig:
    """Settings of a run in `folder` from weights that are written beside it."""
    init = weights(folder.parent / "init.safetensors", 1)
    teacher = weights(folder.parent / "teacher.safetensors", 2)
    base = TrainConfig(
        recipe, output=folder, frames=(4,), chunks=(1, 3), windows=(3, 4), steps=4, batch=4,
        lr=1e-3, warmup=3, betas=(0.5, 0.99), clip=1.0, ema=0.9, ema_start=1, min_sigma=0.3,
        critic_steps=1, critic_warmup=1, lr_critic=1e-3, guidance_scale=2.5, pairs=6, save_every=2,
        teacher_steps=20, threads=1, init=init, teacher=teacher,
    )  # fmt: skip
    return replace(base, **change)


def saved(path: Path) -> dict[str, Any]:
    """All that a checkpoint holds, by its full name."""
    whole = io.BytesIO()
    dcp_to_torch_save(path, whole)  # type: ignore[arg-type]
    whole.seek(0)
    return flat(torch.load(whole, weights_only=False))


def flat(state: Any, name: str = "") -> dict[str, Any]:
    if isinstance(state, Mapping):
        items = state.items()
    elif isinstance(state, (list, tuple)):
        items = dict(enumerate(state)).items()
    else:
        return {name: state}
    return {k: v for key, value in items for k, v in flat(value, f"{name}/{key}").items()}


def apart(one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """The largest difference between two of `saved`, tensor by tensor, relative to its norm."""
    assert one.keys() == other.keys() and one
    most = 0.0
    for name, value in one.items():
        if not isinstance(value, Tensor):
            assert value == other[name], name
        elif not torch.equal(value, other[name]):
            most = max(most, float((value - other[name]).norm() / value.norm()))
    return most


def steps(folder: Path) -> list[str]:
    """The names of all that lies among a run's checkpoints."""
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def logged(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def draw_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws pictures after all."""
    monkeypatch.setattr(report, "plot", PLOT)
    monkeypatch.setattr(report.Report, "sample", SAMPLE)
