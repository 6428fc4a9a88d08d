"""A whole clip at once: its samplers beside others' and beside the trainer's, and the command."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sfkernels import Noise, normal
from sfmodel.dit import DiT
from sfmodel.schedule import FlowSchedule
from sfmodel.stream import Stream
from sfmodel.toy.vae import ToyVAE
from sfmodel.train.trajectories import solve
from sfmodel.whole_clip import UniPC, WholeClip, levels
from tests.test_generate import RED, colours, made, refused
from tests.test_stream import SMALL, TEXT
from tests.test_stream import model as model

CLIP = replace(SMALL, chunk=5, window=5)


@pytest.mark.parametrize(("steps", "shift"), [(50, 5.0), (10, 3.0), (3, 8.0), (2, 5.0), (1, 5.0)])
def test_unipc_is_that_of_diffusers(steps: int, shift: float) -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.UniPCMultistepScheduler(
        num_train_timesteps=1000, prediction_type="flow_prediction", use_flow_sigmas=True,
        flow_shift=shift, solver_order=2,
    )  # fmt: skip
    theirs.set_timesteps(steps)
    sigmas = theirs.sigmas.tolist()
    weight = 0.3 * torch.randn(8, 8, dtype=torch.float64)

    def flow(x: Tensor, sigma: float) -> Tensor:
        return torch.tanh(x @ weight) * (1 + sigma) - x / 2

    x = y = torch.randn(4, 8, dtype=torch.float64)
    ours = UniPC(sigmas)
    for t, sigma in zip(theirs.timesteps, sigmas, strict=False):
        x = theirs.step(flow(x, sigma), t, x, return_dict=False)[0]
        y = ours.step(y, y - sigma * flow(y, sigma))
        torch.testing.assert_close(y, x, rtol=1e-5, atol=1e-5)


def test_levels() -> None:
    assert levels("euler", 4, 1.0) == pytest.approx([1, 0.75, 0.5, 0.25, 0])
    assert levels("euler", 2, 5.0) == pytest.approx([1, 5 / 6, 0])
    assert levels("unipc", 2, 1.0) == pytest.approx([0.999, 0.4995, 0])


@torch.no_grad()
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_euler_is_the_teachers(model: DiT, guidance: float) -> None:
    """Of two clips, each with a seed of its own."""
    clip = WholeClip(model, None, TEXT, CLIP, negative_BTE=TEXT[:1], guidance=guidance,
                     sampler="euler", steps=6, seed=3, batch=2)  # fmt: skip
    noise = normal(
        Noise(torch.tensor([3, 4]), torch.arange(5, dtype=torch.int32), 0), (2, 5, 4, 8, 8)
    )
    want = solve(
        functools.partial(model, text_BTE=TEXT), noise, FlowSchedule(CLIP.shift), (), 6,
        unprompted=functools.partial(model, text_BTE=TEXT[:1]), guidance=guidance,
    )[:, -1]  # fmt: skip
    scale = float(want.abs().max())
    torch.testing.assert_close(clip.denoise(), want, rtol=1e-5, atol=1e-5 * scale)


@torch.no_grad()
def test_its_frames(model: DiT) -> None:
    codec = ToyVAE()
    clip = WholeClip(model, codec, TEXT[:1], CLIP, guidance=1, steps=3)
    assert torch.cat([*clip.frames(10)], 1).shape == (1, 10, 64, 64, 3)
    assert torch.cat([*clip.frames(7)], 1).shape == (1, 7, 64, 64, 3)
    with pytest.raises(ValueError, match="a whole clip has 5 latent frames: no more to come"):
        next(clip.frames(1))


def test_what_does_not_fit(model: DiT) -> None:
    for said, options in (
        ("needs a negative prompt", {}),
        ("sampler='heun': must be one of euler, unipc", {"sampler": "heun", "guidance": 1}),
        ("steps=0: must be at least 1", {"steps": 0, "guidance": 1}),
    ):
        with pytest.raises(ValueError, match=said):
            WholeClip(model, None, TEXT[:1], CLIP, **options)


@pytest.mark.parametrize("sampler", ["euler", "unipc"])
def test_generate(tmp_path: Path, sampler: str) -> None:
    """The toy's teacher does what the prompt says."""
    words = "--sampler", sampler, "--steps", "12", "--frames", "22", "--guidance", "3"
    got = made(tmp_path, *words, "--prompt", "a large red ball")
    assert len(got) == 22 and {*colours(got)} == {RED}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--image a.png", "image: goes with --sampler few-step"),
        ("--save-state a", "save_state: goes with --sampler few-step"),
        ("--frames endless", "frames=endless: goes with --sampler few-step"),
        ("--sink 1", "sink: goes with --sampler few-step"),
        ("--steps 5 4", "steps=(5, 4): of a whole clip must be a number of steps"),
        ("--steps 0", "steps=0: must be at least 1"),
    ],
)
def test_what_is_refused(capsys: pytest.CaptureFixture[str], words: str, said: str) -> None:
    assert said in refused(capsys, "--sampler", "euler", *words.split())


@torch.no_grad()
def test_steps_as_they_are_meant(model: DiT) -> None:
    """Warped ones are those that the schedule would make of others."""
    schedule = FlowSchedule(SMALL.shift)
    steps = (1000, 600, 300)
    warped = tuple(round(float(t)) for t in schedule.warp(steps))
    mine = Stream(model, None, TEXT[:1], replace(SMALL, steps=warped, warped=True))
    assert [round(1000 * float(sigma)) for sigma in mine.sigmas] == pytest.approx(warped, abs=1)
    plain = Stream(model, None, TEXT[:1], replace(SMALL, steps=steps))
    torch.testing.assert_close(mine.denoise(), plain.denoise(), rtol=0.02, atol=0.02)
