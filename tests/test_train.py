"""Training: the objective, exact resume, and folders that hold something else."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sfkernels import BlockLayout
from sfmodel import checkpoint
from sfmodel.config import PRESETS
from sfmodel.dit import DiT
from sfmodel.train import loop
from sfmodel.train.loop import TrainConfig, train
from sfmodel.train.objectives import teacher_forcing_loss


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    toy = PRESETS["toy"]
    small = replace(toy, dit=replace(toy.dit, dim=64, heads=1, ffn_dim=64, layers=1))
    monkeypatch.setitem(PRESETS, "toy", small)


def config(folder: Path, **change: Any) -> TrainConfig:
    base = TrainConfig(
        output=folder,
        steps=6,
        batch=14,
        frames=(1, 7),
        windows=(3, 6),
        warmup=2,
        log_every=2,
        threads=1,
    )
    return replace(base, **change)


def test_objective_is_the_weighted_flow_error() -> None:
    torch.manual_seed(0)
    model = DiT(PRESETS["toy"].dit).double()
    torch.nn.init.normal_(model.head.head.weight, std=0.1)
    clean, context, noise = torch.randn(3, 2, 4, 4, 8, 8, dtype=torch.float64)
    sigma = torch.tensor([[0.1, 0.1, 0.9, 0.9], [0.3, 0.3, 1.0, 1.0]], dtype=torch.float64)
    text = torch.randn(2, 3, 32, dtype=torch.float64)
    layout = BlockLayout.causal(4, 2, 4, teacher_forcing=True)
    loss = teacher_forcing_loss(model, clean, context, noise, sigma, text, layout)
    s = sigma[:, :, None, None, None]
    x = (1 - s) * clean + s * noise
    flow = model(x, sigma * 1000, text, layout=layout, clean_BFCHW=context)
    x0 = x - s * flow  # the model itself says x0; its error counts as 1 / max(σ, 0.3)²
    want = ((x0 - clean) / s.clamp(min=0.3)).square().mean()
    torch.testing.assert_close(loss, want, rtol=1e-6, atol=1e-6)

    seen = 0.7 * clean  # the model looks at something else than what it is to find
    faded = teacher_forcing_loss(model, clean, context, noise, sigma, text, layout, seen_BFCHW=seen)
    x = (1 - s) * seen + s * noise
    flow = model(x, sigma * 1000, text, layout=layout, clean_BFCHW=context)
    want = ((x - s * flow - clean) / s.clamp(min=0.3)).square().mean()
    torch.testing.assert_close(faded, want, rtol=1e-6, atol=1e-6)


def test_training_learns(tmp_path: Path) -> None:
    train(config(tmp_path, steps=60, batch=28, frames=(4,), log_every=10))
    losses = [
        json.loads(line)["loss"] for line in (tmp_path / "log.jsonl").read_text().splitlines()
    ]
    assert len(losses) == 6 and losses[-1] < 0.7 * losses[0]
    assert (tmp_path / "loss.png").stat().st_size > 1000


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    whole = train(config(tmp_path / "whole"))

    class Stop(Exception):
        pass

    class Stopping(loop.Run):
        def train_step(self) -> float:
            if self.step == 3:
                self.save()
                raise Stop
            return super().train_step()

    original, loop.Run = loop.Run, Stopping  # type: ignore[misc]
    try:
        with pytest.raises(Stop):
            train(config(tmp_path / "parts"))
    finally:
        loop.Run = original  # type: ignore[misc]
    torch.manual_seed(123)  # nothing may hang on the global generator
    parts = train(config(tmp_path / "parts"), resume=True)
    a, b = load_file(whole), load_file(parts)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    states = [torch.load(p.parent / "run.pt", weights_only=True) for p in (whole, parts)]
    for key in ("model", "average"):
        assert all(torch.equal(v, states[1][key][k]) for k, v in states[0][key].items())


def test_an_interrupt_ends_the_step_and_saves_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C between the update of the weights and that of their average, the worst moment."""
    whole = train(config(tmp_path / "whole"))
    with monkeypatch.context() as patch:
        update = torch.optim.AdamW.step

        def interrupted(self: torch.optim.AdamW) -> None:
            update(self)
            calls.append(1)
            if len(calls) == 4:
                signal.raise_signal(signal.SIGINT)

        calls: list[int] = []
        patch.setattr(torch.optim.AdamW, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(config(tmp_path / "parts"))
    assert torch.load(tmp_path / "parts" / "run.pt", weights_only=True)["step"] == 4
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    a, b = load_file(whole), load_file(train(config(tmp_path / "parts"), resume=True))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_folders_of_other_runs_are_left_alone(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no run to resume"):
        train(config(tmp_path), resume=True)
    train(config(tmp_path, steps=2))
    before = (tmp_path / "run.pt").read_bytes()
    with pytest.raises(ValueError, match="holds a run already"):
        train(config(tmp_path))
    with pytest.raises(ValueError, match=r"is of a run with lr=0\.002"):
        train(config(tmp_path, lr=1e-3), resume=True)
    assert (tmp_path / "run.pt").read_bytes() == before
    (tmp_path / "run.pt").write_bytes(before[:1000])
    with pytest.raises(ValueError, match="not a whole checkpoint"):
        train(config(tmp_path), resume=True)


def test_a_failed_write_keeps_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(config(tmp_path, steps=2))
    before = (tmp_path / "run.pt").read_bytes()

    def full_disk(state: object, path: Path) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        train(config(tmp_path, steps=4), resume=True)
    assert (tmp_path / "run.pt").read_bytes() == before
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_trained_weights_carry_public_names(tmp_path: Path) -> None:
    weights = train(config(tmp_path, steps=1))
    state, metadata = checkpoint.read(weights)
    assert "blocks.0.self_attn.q.weight" in state and json.loads(metadata["step"]) == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(preset="wan-1.3b"), "trains 'toy'"),
        (dict(steps=0), "steps=0"),
        (dict(frames=(6,)), "must be 1 plus a multiple"),
        (dict(windows=(2,)), "smaller than a chunk"),
        (dict(batch=3), "must hold a clip of 7 frames"),
    ],
)
def test_bad_settings(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        config(tmp_path, **change)
