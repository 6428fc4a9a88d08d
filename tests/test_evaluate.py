"""The measure: known distances, videos whose faults are known, and models on both pasts."""

from __future__ import annotations

import itertools
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sfmodel.cli import main
from sfmodel.config import PRESETS, DiTConfig, Preset
from sfmodel.dit import DiT
from sfmodel.schedule import FlowSchedule
from sfmodel.stream import Stream
from sfmodel.toy import evaluate, world
from sfmodel.toy.evaluate import Sampling, frechet, generate, held_out, measure, score, seen_in
from sfmodel.toy.vae import ToyVAE

FRAMES = 5
LENGTH = 1 + 4 * (FRAMES - 1)


@pytest.fixture(scope="module")
def codec() -> ToyVAE:
    return ToyVAE.from_pretrained()


def test_the_distance_of_known_gaussians() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(20_000, 3, generator=generator, dtype=torch.float64)
    assert frechet(a, a) == pytest.approx(0, abs=1e-9)
    shift, scale = torch.tensor([1.0, 0.0, -2.0]), torch.tensor([1.0, 3.0, 0.5])
    # ‖μ‖² + Σ(σ − 1)², as the axes are independent.
    want = 1 + 4 + (3 - 1) ** 2 + (0.5 - 1) ** 2
    assert frechet(scale * a + shift, a) == pytest.approx(want, rel=0.03)
    # Correlated, against the product of matrices by hand.
    mix = torch.tensor([[1.0, 0.8, 0.0], [0.0, 0.6, 0.0], [0.3, 0.0, 1.0]], dtype=torch.float64)
    b = a @ mix
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    vectors = torch.linalg.eigh(cov_a)
    root = vectors.eigenvectors @ vectors.eigenvalues.sqrt().diag() @ vectors.eigenvectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).sqrt().sum()
    want = (a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    assert frechet(a, b) == pytest.approx(float(want), rel=1e-6)


def rendered(position_BT2: Tensor, radius: float = 8.0, colour: int = 6) -> Tensor:
    """One ball a video on a given path."""
    count = len(position_BT2)
    ones = torch.ones(count)
    truth = world.Truth(
        torch.full((count,), colour), radius * ones, 0.8 * ones, ones, ones, position_BT2
    )
    return world.render(truth)


def path(velocity: float, at: float = 20.0) -> Tensor:
    """[1, T, 2], to the right."""
    x = at + velocity * torch.arange(LENGTH, dtype=torch.float32)
    return torch.stack([x, torch.full_like(x, 32.0)], -1)[None]


def test_statistics_of_a_straight_path() -> None:
    seen = measure(rendered(path(1.25)))
    x, y, radius, red, green, blue, vx, vy, speed, change = seen.statistics[0].unbind(-1)
    torch.testing.assert_close(x, 20 + 5.0 * torch.arange(FRAMES), atol=0.05, rtol=0)
    torch.testing.assert_close(y, torch.full((FRAMES,), 32.0), atol=0.05, rtol=0)
    torch.testing.assert_close(radius, torch.full((FRAMES,), 8.0), atol=0.15, rtol=0)
    for light in (red, green, blue):
        torch.testing.assert_close(light, torch.full((FRAMES,), 0.8), atol=0.02, rtol=0)
    torch.testing.assert_close(vx[1:], torch.full((FRAMES - 1,), 1.25), atol=0.02, rtol=0)
    assert vx[0] == 0 and vy.abs().max() < 0.02 and change.abs().max() < 0.02
    torch.testing.assert_close(speed, vx.abs(), atol=0.02, rtol=0)
    assert seen.clean.all() and not seen.impossible.any() and seen.free[0, 1:].any()


def test_a_jump_is_impossible_a_bounce_is_not() -> None:
    jump = path(0.5)
    jump[:, 9:, 0] += 6
    seen = measure(rendered(jump))
    assert seen.impossible[0].nonzero().flatten().tolist() == [2, 3]  # around pixel frame 9
    truth = world.draw(64, 97, 5)
    bounced = measure(world.render(truth))
    assert bounced.free.any() and not bounced.impossible.any()


def test_a_missing_ball_is_a_row_of_zeros() -> None:
    pixels = rendered(path(1.0))
    pixels[:, 8] = -1
    seen = measure(pixels)
    assert seen.statistics[0, 2, :6].eq(0).all() and seen.statistics.isfinite().all()
    assert seen.radius[0, 2].isnan() and not seen.clean[0, 2]


def test_faults_are_measured_by_their_own_name(codec: ToyVAE) -> None:
    """Distance, drift of radius and brightness, other colours, against the floor of real videos."""
    held = held_out(codec, FRAMES, 64)
    real = world.draw(64, LENGTH, 99)
    good = score(measure(world.render(real)), held.real_NFD)
    assert max(good["distance"]) < 1.0  # of 64 videos: most of it is their number
    assert max(good["radius"]) < 0.2 and max(good["colour"]) == 0 == max(good["impossible"])

    later = slice(9, None)
    pixels = world.render(real)
    dim = pixels.clone()
    dim[:, later] = (dim[:, later] + 1) / 2 - 1
    faded = score(measure(dim), held.real_NFD)
    # Latent frames 3 and 4 end at pixel frames 12 and 16.
    mean = float(real.brightness_B.mean())
    assert faded["brightness"][4] == pytest.approx(mean / 2, rel=0.05)
    assert faded["brightness"][2] < 0.02 and faded["distance"][4] > 2 * good["distance"][4]
    assert faded["distance"][2] == pytest.approx(good["distance"][2])

    grown = world.render(replace(real, radius_B=real.radius_B * 1.3))
    both = torch.cat([pixels[:, :9], grown[:, later]], 1)
    swollen = score(measure(both), held.real_NFD)
    assert swollen["radius"][4] == pytest.approx(0.3 * float(real.radius_B.mean()), rel=0.1)

    other = world.render(replace(real, colour_B=(real.colour_B + 1) % len(world.COLOURS)))
    both = torch.cat([pixels[:, :9], other[:, later]], 1)
    assert score(measure(both), held.real_NFD)["colour"] == [0, 0, 0, 1, 1]


def test_splits_and_prompts_are_others(codec: ToyVAE) -> None:
    test, validation = (held_out(codec, FRAMES, 16, split) for split in ("test", "validation"))
    assert (test.real_NFD - validation.real_NFD).abs().max() > 1
    assert (test.latents_BFCHW - validation.latents_BFCHW).abs().max() > 1
    torch.testing.assert_close(test.real_NFD, held_out(codec, FRAMES, 16).real_NFD)


CONFIG = DiTConfig(
    dim=32, ffn_dim=32, heads=1, layers=2, channels=4, patch=(1, 4, 4), freq_dim=16, text_dim=32,
    text_len=16,
)  # fmt: skip
SMALL = Preset(CONFIG, height=8, width=8, shift=6.0, chunk=3, first=1, window=7)


@pytest.fixture
def model() -> DiT:
    torch.manual_seed(0)
    model = DiT(CONFIG)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def test_on_its_own_past_a_model_streams(model: DiT) -> None:
    text = torch.randn(2, 3, 32)
    got = generate(model, Sampling(SMALL), text, 9, seed=3)
    chunks = Stream(model, None, text, SMALL, seed=3, batch=2).latents()
    want = torch.cat([next(chunks) for _ in range(4)], 1)[:, :9]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_on_a_real_past_only_that_is_seen(model: DiT) -> None:
    """A chunk depends on the real frames before it, and not on those from it on."""
    text, real = torch.randn(2, 3, 32), torch.randn(2, 7, 4, 8, 8)
    got = generate(model, Sampling(SMALL), text, 7, context_BFCHW=real)
    own = generate(model, Sampling(SMALL), text, 7)
    torch.testing.assert_close(got[:, :1], own[:, :1], rtol=0, atol=0)  # no past yet
    assert (got[:, 1:] - own[:, 1:]).abs().amax((0, 2, 3, 4)).min() > 1e-3
    changed = real.clone()
    changed[:, 1:4] += 1
    again = generate(model, Sampling(SMALL), text, 7, context_BFCHW=changed)
    torch.testing.assert_close(again[:, :4], got[:, :4], rtol=0, atol=0)
    assert (again[:, 4:] - got[:, 4:]).abs().amax((0, 2, 3, 4)).min() > 1e-3


def test_a_video_that_goes_on_from_a_real_one(model: DiT) -> None:
    """It begins with the given frames; what follows is what a stream makes of them."""
    text, real = torch.randn(2, 3, 32), torch.randn(2, 4, 4, 8, 8)
    got = generate(model, Sampling(SMALL, given=4), text, 7, seed=3, start_BFCHW=real)
    stream = Stream(model, None, text, SMALL, seed=3, batch=2)
    stream.prefill(real)
    torch.testing.assert_close(got[:, :4], real, rtol=0, atol=0)
    torch.testing.assert_close(got[:, 4:], stream.denoise(), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="given=3: must be 1 plus a multiple of 3"):
        Sampling(SMALL, given=3)


def test_euler_steps_follow_the_flow(model: DiT, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the flow x, dx/dσ = x from 1 to 0: the product of 1 − Δσ."""
    monkeypatch.setattr(DiT, "forward", lambda self, x, *_, **__: x)
    sampling = Sampling(SMALL, euler=5)
    got = generate(model, sampling, torch.zeros(1, 1, 32), 1, seed=1)
    few = Sampling(replace(SMALL, steps=(1000,)))
    start = generate(model, few, torch.zeros(1, 1, 32), 1, seed=1)  # x0 = x − 1·x = 0
    assert start.abs().max() < 1e-6
    steps = [1000, 800, 600, 400, 200]
    sigmas = [*FlowSchedule(6.0).sigma(FlowSchedule(6.0).warp(steps)).tolist(), 0.0]
    factor = math.prod(1 + b - a for a, b in itertools.pairwise(sigmas))
    noise = torch.randn(1, 1, 4, 8, 8)
    stream = Stream(model, None, torch.zeros(1, 1, 32), SMALL, euler=5, noise=lambda i: noise)
    torch.testing.assert_close(stream.denoise(), factor * noise)
    assert got.std() == pytest.approx(abs(factor), rel=0.2)


def test_bands_and_means() -> None:
    assert evaluate.bands(28, 7) == [(3, 7), (7, 14), (14, 28)]
    assert evaluate.bands(70, 7) == [(3, 7), (7, 14), (14, 28), (28, 70)]
    assert evaluate.bands(20, 7) == [(3, 7), (7, 14)]
    assert evaluate.over([0.0, 1.0, 2.0, 3.0], (1, 3)) == 1.5


def test_the_gap_is_own_minus_real(codec: ToyVAE, model: DiT) -> None:
    held = held_out(codec, 7, 20)
    result = evaluate.evaluate(model, Sampling(SMALL), codec, held, 7)
    late = slice(3, 7)
    means = [sum(result[name][late]) / 4 for name in ("own", "real")]
    assert result["gap"] == pytest.approx(means[0] - means[1])
    own = generate(model, Sampling(SMALL), held.text_BTE, 7)
    want = evaluate.distances(seen_in(codec, own).statistics, held.real_NFD)
    assert result["distance"] == pytest.approx(want, rel=1e-3)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert PRESETS["toy"].first == 1
    arguments = ["--videos", "16", "--frames", "7", "--trained", "4", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["sfmodel", "evaluate", *arguments])
    main.main()
    result = json.loads((tmp_path / "evaluation.json").read_text())
    assert len(result["distance"]) == 7 and len(result["own"]) == 4
    assert (tmp_path / "evaluation.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--videos", "3"], "videos=3: must be at least 16"),
        (["--frames", "5"], "frames=5: must be at least 7"),
        (["--window", "2"], "window"),
        (["--checkpoint", "nowhere.safetensors"], "no such checkpoint"),
    ],
)
def test_bad_arguments(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    words = ["sfmodel", "evaluate", "--output", str(tmp_path), *arguments]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as stopped:
        main.main()
    assert stopped.value.code == 2 and said in capsys.readouterr().err


def test_what_is_not_finite_is_not_measured() -> None:
    latents_BFCHW = torch.zeros(3, 4, 4, 8, 8)
    latents_BFCHW[1, 2, 0, 5, 5] = torch.nan
    with pytest.raises(
        FloatingPointError, match="video 1 holds NaN or infinity from latent frame 2"
    ):
        seen_in(ToyVAE(), latents_BFCHW)
