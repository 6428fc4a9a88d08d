"""Objectives of generated videos against double-precision computations by hand."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sfkernels import BlockLayout
from sfmodel.config import DiTConfig
from sfmodel.dit import DiT
from sfmodel.schedule import FlowSchedule
from sfmodel.train import objectives
from sfmodel.train.objectives import dmd, gan, ode, sid
from sfmodel.train.objectives.flow import diffusion_forcing_loss, teacher_forcing_loss

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


def score(inputs: tuple[Tensor, ...], real: Score, fake: Score, guidance: float) -> dmd.Score:
    _, noise, t, text, unprompted = inputs
    return functools.partial(
        dmd.scores, noise_BFCHW=noise, t_B=t, text_BTE=text, unprompted_BTE=unprompted,
        real=real, fake=fake, schedule=SCHEDULE, guidance=guidance,  # type: ignore[arg-type]
    )  # fmt: skip


def by_hand(real: Score, fake: Score, guidance: float) -> Callable[..., tuple[Tensor, Tensor]]:
    """x0 of both scores, sample by sample and element by element."""

    def x0(x: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        noise, t, text, unprompted = rest
        out = []
        for score, scale in ((real, guidance - 1), (fake, 0.0)):
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
    t = objectives.score_timesteps(torch.tensor([0.0, 0.001, 0.5003, 0.9999]), SCHEDULE)
    assert t.tolist() == pytest.approx([20.0, 20.0, 1000 * 2.5 / 3.0, 980.0])


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_dmd(guidance: float) -> None:
    """The gradient with respect to the video, and none to the scores."""
    inputs = drawn()
    real, fake = Score(0.7, 0.2), Score(0.4, -0.3)
    x = inputs[0].requires_grad_()
    loss = dmd.dmd_loss(x, score(inputs, real, fake, guidance))
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
    loss = sid.sid_loss(x, score(inputs, real, fake, 3.0))
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
    loss = dmd.critic_loss(fake, x, noise, t, text, SCHEDULE)  # type: ignore[arg-type]
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


class Causal(Score):
    """The same with a timestep of each frame; a clean half adds its own latents to the flow."""

    def forward(  # type: ignore[override]
        self, x: Tensor, t: Tensor, text: Tensor, *, layout: BlockLayout,
        clean_BFCHW: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        a, b = self.weights
        assert layout.teacher_forcing == (clean_BFCHW is not None)
        flow = a * x + b * t[:, :, None, None, None] / 1000
        return flow if clean_BFCHW is None else flow + clean_BFCHW


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("context", ["none", "clean"])
def test_flow_matching_of_clips(context: str, weighted: bool) -> None:
    """Teacher and diffusion forcing: value and gradient, element by element."""
    clean, past, noise, _ = torch.randn(4, *SHAPE, dtype=torch.float64)
    sigma = torch.tensor([[0.2, 0.9, 0.9], [1.0, 0.4, 0.4]], dtype=torch.float64)
    weight = torch.tensor([[0.5, 2.0, 2.0], [1.0, 3.0, 3.0]], dtype=torch.float64)
    model: Any = Causal(0.4, -0.3)
    text, shared = torch.zeros(2, 1, 3), (noise, sigma)
    layout = BlockLayout((1, 2), 4, teacher_forcing=context == "clean")
    given = weight if weighted else None
    if context == "clean":
        loss = teacher_forcing_loss(model, clean, past, *shared, text, layout, given)
    else:
        loss = diffusion_forcing_loss(model, clean, *shared, text, layout, given)
    (got,) = torch.autograd.grad(loss, model.weights)
    a, b = model.weights.tolist()
    total, want, count = 0.0, torch.zeros(2, dtype=torch.float64), clean.numel()
    for i in range(SHAPE[0]):
        for f in range(SHAPE[1]):
            s, w = float(sigma[i, f]), float(weight[i, f]) if weighted else 1.0
            values = (x[i, f].flatten().tolist() for x in (clean, past, noise))
            for x0, seen, eps in zip(*values, strict=True):
                x = (1 - s) * x0 + s * eps
                flow = a * x + b * s + (seen if context == "clean" else 0.0)
                error = flow - (eps - x0)
                total += w * error**2
                want += 2 * w * error * torch.tensor([x, s], dtype=torch.float64)
    assert loss.item() == pytest.approx(total / count, rel=1e-6)
    torch.testing.assert_close(got, want / count, rtol=1e-6, atol=1e-9)


def test_the_gradient_of_ode_regression() -> None:
    """By hand: x0 = x − σ·flow, with the schedule's σ of the few steps."""
    x, clean = torch.randn(2, *SHAPE, dtype=torch.float64)
    model: Any = Causal(0.4, -0.3)
    steps = SCHEDULE.warp([1000, 500])
    t = steps[torch.tensor([[0, 1, 1], [1, 0, 0]])].double()
    layout, text = BlockLayout((1, 2), 4), torch.zeros(2, 1, 3)
    loss = ode.ode_regression_loss(model, x, t, clean, text, layout, SCHEDULE)
    (got,) = torch.autograd.grad(loss, model.weights)
    a, b = model.weights.tolist()
    want = torch.zeros(2, dtype=torch.float64)
    for i in range(SHAPE[0]):
        for f in range(SHAPE[1]):
            level = float(t[i, f]) / 1000
            for point, end in zip(
                x[i, f].flatten().tolist(), clean[i, f].flatten().tolist(), strict=True
            ):
                error = point - level * (a * point + b * level) - end
                want += 2 * error * torch.tensor([-level * point, -level * level])
    torch.testing.assert_close(got, want / x.numel(), rtol=1e-5, atol=1e-8)


def test_ode_regression_is_the_error_of_x0() -> None:
    model = DiT(DiTConfig(dim=16, ffn_dim=16, heads=1, layers=1, channels=4, patch=(1, 1, 1),
                          freq_dim=8, text_dim=3, text_len=5))  # fmt: skip
    nn.init.normal_(model.head.head.weight, std=0.1)
    x, clean = torch.randn(2, *SHAPE)
    t = SCHEDULE.warp([1000, 500])[torch.tensor([[0, 1, 1], [1, 0, 0]])]
    text, layout = torch.randn(2, 5, 3), BlockLayout((1, 2), 4)
    loss = ode.ode_regression_loss(model, x, t, clean, text, layout, SCHEDULE)
    flow = model(x, t, text, layout=layout)
    sigma = torch.tensor([[1.0, 0.833333, 0.833333], [0.833333, 1.0, 1.0]])
    want = (x - sigma[:, :, None, None, None] * flow - clean).square().mean()
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
    loss.backward()
    assert all(p.grad is not None for p in model.blocks.parameters())


class Logit(nn.Module):
    """A logit that can be differentiated by hand: a·sum of x_t + b·sum of x_t²."""

    def __init__(self, a: float, b: float) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.tensor([a, b], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.weights
        return a * x.sum((1, 2, 3, 4)) + b * x.square().sum((1, 2, 3, 4))


def noisy(x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Sample by sample."""
    sigmas = [float(SCHEDULE.sigma(each)) for each in t]
    return torch.stack([(1 - s) * x[i] + s * noise[i] for i, s in enumerate(sigmas)])


def sums(x_t: Tensor) -> list[Tensor]:
    """The derivative of each sample's `Logit` with respect to its weights."""
    return [torch.stack([each.sum(), each.square().sum()]) for each in x_t]


def test_the_relativistic_loss_of_pairs() -> None:
    winner = torch.tensor([0.5, -2.0], dtype=torch.float64, requires_grad=True)
    loser = torch.tensor([-1.0, 1.0], dtype=torch.float64, requires_grad=True)
    loss = gan.relativistic_loss(winner, loser)
    assert loss.item() == pytest.approx((math.log1p(math.exp(-1.5)) + math.log1p(math.exp(3))) / 2)
    loss.backward()
    want = [-1 / (1 + math.exp(1.5)) / 2, -1 / (1 + math.exp(-3)) / 2]
    assert winner.grad is not None and winner.grad.tolist() == pytest.approx(want)
    assert loser.grad is not None and loser.grad.tolist() == pytest.approx([-w for w in want])
    assert gan.relativistic_loss(torch.tensor([-200.0]), torch.tensor([200.0])) == 400


def test_the_penalty_is_the_squared_slope_in_a_direction() -> None:
    logit = torch.tensor([1.0, 2.0], requires_grad=True)
    perturbed = torch.tensor([1.1, 1.6], requires_grad=True)
    penalty = gan.finite_difference_penalty(logit, perturbed, 0.2)
    assert penalty.item() == pytest.approx((0.5**2 + 2.0**2) / 2)
    penalty.backward()
    assert perturbed.grad is not None and perturbed.grad.tolist() == pytest.approx([2.5, -10.0])
    assert logit.grad is not None and logit.grad.tolist() == pytest.approx([-2.5, 10.0])


def test_the_penalty_is_on_average_the_squared_gradient() -> None:
    x, logit = torch.randn(1, 1, 2, 1, 2, dtype=torch.float64), Logit(0.3, 0.2)
    with torch.no_grad():
        steps = torch.randn(100_000, 1, 2, 1, 2, dtype=torch.float64)
        perturbed = logit(x + 1e-3 * steps)
        got = gan.finite_difference_penalty(logit(x), perturbed, 1e-3)
        assert float(got) == pytest.approx(float((0.3 + 2 * 0.2 * x).square().sum()), rel=0.03)


def test_the_generator_takes_the_gradient_of_the_generated_video_alone() -> None:
    fake, noise, t, _, _ = drawn()
    real, logit = torch.randn_like(fake).requires_grad_(), Logit(0.05, 0.02)
    other = torch.randn_like(fake)
    fake.requires_grad_()
    loss = gan.gan_generator_loss(logit, fake, real, noise, t, SCHEDULE, other)
    loss.backward()
    with torch.no_grad():
        fake_t, real_t = noisy(fake, noise, t), noisy(real, other, t)
        a, b = logit.weights.tolist()
        total, slope, want = 0.0, torch.empty_like(fake), torch.zeros(2, dtype=torch.float64)
        of_fake, of_real = sums(fake_t), sums(real_t)
        for i in range(len(fake)):
            ahead = float((of_fake[i] - of_real[i]) @ logit.weights)
            total += math.log1p(math.exp(-ahead)) / 2
            d_logit = -1 / (1 + math.exp(ahead)) / 2
            sigma = float(SCHEDULE.sigma(t[i]))
            slope[i] = d_logit * (a + 2 * b * fake_t[i]) * (1 - sigma)
            want += d_logit * of_fake[i]
    assert loss.item() == pytest.approx(total, rel=1e-5)
    torch.testing.assert_close(fake.grad, slope, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(logit.weights.grad, want, rtol=1e-5, atol=1e-9)
    assert real.grad is None


def test_the_discriminator_parts_pairs_with_small_slopes() -> None:
    """Each weight apart from the other, so that neither penalty can stand for the other one."""
    fake, noise, t, _, _ = drawn()
    real, fake_step, real_step = torch.randn(3, *SHAPE, dtype=torch.float64)
    fake.requires_grad_()
    logit, sigma = Logit(0.05, 0.02), 0.1
    fake_t, real_t = noisy(fake.detach(), noise, t), noisy(real, noise, t)
    pairs = list(zip(sums(fake_t), sums(real_t), strict=True))
    differences = []  # by weight: how the derivatives differ between perturbed and unperturbed
    for x_t, step in ((real_t, real_step), (fake_t, fake_step)):
        apart = zip(sums(x_t + sigma * step), sums(x_t), strict=True)
        differences.append([(one - other) / sigma for one, other in apart])
    for weights in ((0.0, 0.0), (7.0, 0.0), (0.0, 5.0), (30.0, 30.0)):
        loss = gan.discriminator_loss(
            logit, fake, real, noise, t, SCHEDULE, fake_step, real_step,
            r1=weights[0], r2=weights[1], penalty_sigma=sigma,
        )  # fmt: skip
        (got,) = torch.autograd.grad(loss, logit.weights, retain_graph=True)
        total, want = 0.0, torch.zeros(2, dtype=torch.float64)
        with torch.no_grad():
            for of_fake, of_real in pairs:
                ahead = float((of_real - of_fake) @ logit.weights)
                total += math.log1p(math.exp(-ahead)) / 2
                want -= (of_real - of_fake) / (1 + math.exp(ahead)) / 2
            for weight, difference in zip(weights, differences, strict=True):
                for each in difference:
                    slope = float(each @ logit.weights)
                    total += weight / 2 * slope**2 / 2  # half the weight, of two samples
                    want += weight / 2 * 2 * slope * each / 2
        assert loss.item() == pytest.approx(total, rel=1e-5)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-9)
        assert torch.autograd.grad(loss, fake, allow_unused=True)[0] is None


def test_the_penalties_of_the_paper() -> None:
    fake, noise, t, _, _ = drawn()
    real, *steps = torch.randn(3, *SHAPE, dtype=torch.float64)
    loss = functools.partial(
        gan.discriminator_loss, Logit(0.05, 0.02), fake, real, noise, t, SCHEDULE, *steps
    )
    torch.testing.assert_close(loss(), loss(r1=30, r2=30, penalty_sigma=0.05), rtol=0, atol=0)
