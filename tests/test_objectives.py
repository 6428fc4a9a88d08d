"""Objectives of generated videos against double-precision computations by hand."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sfkernels import BlockLayout
from sfmodel.config import DiTConfig
from sfmodel.dit import DiT
from sfmodel.schedule import FlowSchedule
from sfmodel.train import objectives

SCHEDULE = FlowSchedule()
SHAPE = (2, 3, 4, 2, 2)


class Score(nn.Module):
    """A score that can be differentiated by hand: flow = a·x_t + b·t/1000 + mean of the text."""

    def __init__(self, a: float, b: float) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.tensor([a, b], dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        a, b = self.weights
        each = (b * t / 1000 + text.mean((1, 2))).view(-1, 1, 1, 1, 1)
        return a * x + each


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def drawn() -> tuple[Tensor, ...]:
    """x, noise, t, text, unprompted."""
    x, noise = torch.randn(2, *SHAPE, dtype=torch.float64)
    text, unprompted = torch.randn(2, 2, 5, 3, dtype=torch.float64)
    return x, noise, objectives.score_timesteps(torch.rand(2), SCHEDULE), text, unprompted


def score(
    inputs: tuple[Tensor, ...], real: Score, fake: Score, guidance: float
) -> objectives.Score:
    _, noise, t, text, unprompted = inputs
    return functools.partial(
        objectives.scores, noise_BFCHW=noise, t_B=t, text_BTE=text, unprompted_BTE=unprompted,
        real=real, fake=fake, schedule=SCHEDULE, guidance=guidance,  # type: ignore[arg-type]
    )  # fmt: skip


def by_hand(real: Score, fake: Score, guidance: float) -> Callable[..., tuple[Tensor, Tensor]]:
    """x0 of both scores, sample by sample and element by element."""

    def x0(x: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        noise, t, text, unprompted = rest
        out = []
        for score, scale in ((real, guidance), (fake, 0.0)):
            a, b = score.weights.tolist()
            made = torch.empty_like(x)
            for i in range(len(x)):
                sigma = float(SCHEDULE.sigma(t[i]))
                x_t = (1 - sigma) * x[i] + sigma * noise[i]
                common = a * x_t + b * float(t[i]) / 1000
                with_text = common + float(text[i].mean())
                without = common + float(unprompted[i].mean())
                flow = with_text + scale * (with_text - without)
                made[i] = x_t - sigma * flow
            out.append(made)
        return out[0], out[1]

    return x0


def test_timesteps_are_shifted_and_kept_off_the_ends() -> None:
    t = objectives.score_timesteps(torch.tensor([0.0, 0.001, 0.5, 0.999]), SCHEDULE)
    assert t.tolist() == pytest.approx([20.0, 20.0, 1000 * 2.5 / 3.0, 980.0])


@pytest.mark.parametrize("guidance", [0.0, 3.0])
def test_dmd(guidance: float) -> None:
    """The gradient with respect to the video, and none to the scores."""
    inputs = drawn()
    real, fake = Score(0.7, 0.2), Score(0.4, -0.3)
    x = inputs[0].requires_grad_()
    loss = objectives.dmd_loss(x, score(inputs, real, fake, guidance))
    (got,) = torch.autograd.grad(loss, x, retain_graph=True)
    with torch.no_grad():
        real_x0, fake_x0 = by_hand(real, fake, guidance)(*inputs)
        size = (x - real_x0).abs().flatten(1).mean(1).view(-1, 1, 1, 1, 1)
        want = (fake_x0 - real_x0) / size
    torch.testing.assert_close(got, want / x.numel(), rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(loss, 0.5 * want.square().mean(), rtol=1e-5, atol=1e-9)
    loss.backward()
    assert real.weights.grad is None and fake.weights.grad is None


def test_sid() -> None:
    """By differences of the same number computed by hand, the mean held."""
    inputs = drawn()
    real, fake = Score(0.7, 0.2), Score(0.4, -0.3)
    hand = by_hand(real, fake, 3.0)

    def value(x: Tensor, size: Tensor | None = None) -> tuple[Tensor, Tensor]:
        real_x0, fake_x0 = hand(x, *inputs[1:])
        if size is None:
            size = (x - real_x0).abs().flatten(1).mean(1).view(-1, 1, 1, 1, 1)
        apart = real_x0 - fake_x0
        return (apart * ((real_x0 - x) - 1.0 * apart) / size).mean(), size

    x = inputs[0].clone().requires_grad_()
    loss = objectives.sid_loss(x, score(inputs, real, fake, 3.0))
    with torch.no_grad():
        want, size = value(inputs[0])
        torch.testing.assert_close(loss.detach(), want, rtol=1e-5, atol=1e-9)
        (got,) = torch.autograd.grad(loss, x)
        for at in ((0, 0, 0, 0, 0), (1, 2, 3, 1, 0)):
            step = torch.zeros(SHAPE, dtype=torch.float64)
            step[at] = 1e-4
            slope = (value(inputs[0] + step, size)[0] - value(inputs[0] - step, size)[0]) / 2e-4
            assert float(got[at]) == pytest.approx(float(slope), rel=1e-4)


def test_the_critic_learns_the_flow_of_what_is_generated() -> None:
    x, noise, t, text, _ = drawn()
    fake = Score(0.4, -0.3)
    loss = objectives.critic_loss(fake, x, noise, t, text, SCHEDULE)  # type: ignore[arg-type]
    (got,) = torch.autograd.grad(loss, fake.weights)
    want, count = torch.zeros(2, dtype=torch.float64), 0
    total = 0.0
    for i in range(len(x)):
        sigma = float(SCHEDULE.sigma(t[i]))
        for value, eps in zip(x[i].flatten().tolist(), noise[i].flatten().tolist(), strict=True):
            x_t = (1 - sigma) * value + sigma * eps
            a, b = fake.weights.tolist()
            error = a * x_t + b * float(t[i]) / 1000 + float(text[i].mean()) - (eps - value)
            total, count = total + error**2, count + 1
            want += 2 * error * torch.tensor([x_t, float(t[i]) / 1000], dtype=torch.float64)
    assert loss.item() == pytest.approx(total / count, rel=1e-5)
    torch.testing.assert_close(got, want / count, rtol=1e-5, atol=1e-9)


def test_ode_regression_is_the_error_of_x0() -> None:
    model = DiT(DiTConfig(dim=16, ffn_dim=16, heads=1, layers=1, channels=4, patch=(1, 1, 1),
                          freq_dim=8, text_dim=3, text_len=5))  # fmt: skip
    nn.init.normal_(model.head.head.weight, std=0.1)
    x, clean = torch.randn(2, *SHAPE)
    t = SCHEDULE.warp([1000, 500])[torch.tensor([[0, 1, 1], [1, 0, 0]])]
    text, layout = torch.randn(2, 5, 3), BlockLayout((1, 2), 4)
    loss = objectives.ode_regression_loss(model, x, t, clean, text, layout, SCHEDULE)
    flow = model(x, t, text, layout=layout)
    sigma = torch.tensor([[1.0, 0.833333, 0.833333], [0.833333, 1.0, 1.0]])
    want = (x - sigma[:, :, None, None, None] * flow - clean).square().mean()
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
    loss.backward()
    assert all(p.grad is not None for p in model.blocks.parameters())
