"""The discriminator: what it reads of the backbone, and that it learns to tell videos apart."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sfmodel.config import PRESETS, DiTConfig
from sfmodel.dit import DiT
from sfmodel.schedule import FlowSchedule
from sfmodel.train.discriminator import DEPTHS, Discriminator, logits, taps
from sfmodel.train.objectives import gan

CONFIG = DiTConfig(
    dim=32, ffn_dim=48, heads=2, layers=4, channels=4, freq_dim=16, text_dim=8, text_len=6
)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def backbone(config: DiTConfig = CONFIG) -> DiT:
    model = DiT(config)
    for parameter in model.parameters():  # the head is zero at first: any flow would agree
        nn.init.normal_(parameter, std=0.2)
    return model


def head(config: DiTConfig = CONFIG, registers: int = 3) -> Discriminator:
    """With a last layer that is not zero."""
    made = Discriminator(config, registers)
    nn.init.normal_(made.logit.weight)
    return made


def inputs(batch: int = 2, frames: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """x_t, t, text."""
    return torch.randn(batch, frames, 4, 4, 6), torch.rand(batch) * 1000, torch.randn(batch, 5, 8)


def test_the_blocks_that_are_read() -> None:
    assert taps(PRESETS["wan-1.3b"].dit) == (13, 21, 29)
    assert [taps(replace(CONFIG, layers=n)) for n in (1, 2, 3, 4)] == [
        (0,), (0, 1), (0, 1, 2), (1, 2, 3),
    ]  # fmt: skip
    assert [taps(CONFIG, registers) for registers in (1, 2)] == [(3,), (2, 3)]
    for layers in range(3, 100):
        read = taps(replace(CONFIG, layers=layers))
        assert len({*read}) == 3
        for i, depth in zip(read, DEPTHS, strict=True):
            assert abs((i + 1) / layers - depth) <= 0.5 / layers + 1e-9


@pytest.mark.parametrize("keep", [(1, 2, 3), (3, 0), (0,), (2, 2), ()])
def test_features_are_what_the_next_block_is_given(keep: tuple[int, ...]) -> None:
    """The hidden states that enter each block in a forward pass, and what the head's norm is of."""
    model, (x, t, text) = backbone(), inputs()
    entered: list[Tensor] = []
    hooks = [
        block.register_forward_pre_hook(lambda _, args: entered.append(args[0]))
        for block in model.blocks
    ]
    after: list[Tensor] = []  # what the head is given
    hooks.append(model.head.head.register_forward_pre_hook(lambda _, args: after.append(args[0])))
    flow = model(x, t, text)
    for hook in hooks:
        hook.remove()
    got = model.features(x, t, text, keep)
    assert len(got) == len(keep)
    for i, hidden in zip(keep, got, strict=True):
        if i + 1 < CONFIG.layers:
            torch.testing.assert_close(hidden, entered[i + 1], rtol=0, atol=0)
        else:
            shift, scale = model.modulation(t).head.unbind(2)
            want = nn.functional.layer_norm(hidden, hidden.shape[-1:], eps=CONFIG.eps)
            torch.testing.assert_close(after[0], want * (1 + scale) + shift)
    torch.testing.assert_close(model(x, t, text), flow, rtol=0, atol=0)


def test_no_block_runs_after_the_last_one_that_is_kept() -> None:
    model, (x, t, text) = backbone(), inputs()
    ran = []
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, i=i: ran.append(i))
    model.features(x, t, text, (2, 0))
    assert ran == [0, 1, 2]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("layers", [1, 2, 4])
def test_gradients_reach_the_backbone_and_the_head(layers: int, recompute: bool) -> None:
    config = replace(CONFIG, layers=layers)
    model, made = backbone(config), head(config)
    model.recompute = recompute
    x, t, text = inputs()
    out = logits(model, made, x.requires_grad_(), t, text)
    assert out.shape == (2,) and out.dtype == torch.float32 and out.unique().numel() == 2
    out.sum().backward()
    assert x.grad is not None and (x.grad.flatten(1).abs().sum(1) > 0).all()
    reached = [*made.parameters(), *model.blocks.parameters(), model.patch_embedding.weight]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in reached)


def test_a_logit_depends_on_its_own_video_time_and_prompt() -> None:
    model, made, (x, t, text) = backbone(), head(), inputs()
    both = logits(model, made, x, t, text)
    torch.testing.assert_close(both, made(model.features(x, t, text, (1, 2, 3))))
    alone = torch.cat([logits(model, made, x[i:][:1], t[i:][:1], text[i:][:1]) for i in (0, 1)])
    torch.testing.assert_close(both, alone)
    for other in ((x + 0.1, t, text), (x, t / 2, text), (x, t, text + 1)):
        assert (logits(model, made, *other) - both).abs().min() > 1e-4


@pytest.mark.parametrize("registers", [1, 2, 3])
def test_every_tapped_block_counts(registers: int) -> None:
    made = head(registers=registers)
    features = [*torch.randn(registers, 2, 7, CONFIG.dim)]
    out = made(features)
    for i in range(registers):
        other = [torch.randn_like(x) if i == j else x for j, x in enumerate(features)]
        assert (made(other) - out).abs().min() > 1e-4


def test_every_logit_is_zero_at_first() -> None:
    assert torch.equal(logits(backbone(), Discriminator(CONFIG), *inputs()), torch.zeros(2))


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_in_bfloat16_the_logit_is_not_rounded(weights: torch.dtype) -> None:
    made = head().to(weights)
    features = [*torch.randn(3, 64, 7, CONFIG.dim, dtype=torch.bfloat16)]
    with torch.autocast("cpu", torch.bfloat16, enabled=weights == torch.float32):
        out = made(features)
    assert out.dtype == torch.float32 and not torch.equal(out, out.bfloat16().float())
    torch.testing.assert_close(out, made.float()([x.float() for x in features]), rtol=0, atol=0.1)


def test_it_learns_to_tell_two_kinds_of_video_apart() -> None:
    """Darker videos, which are generated, and brighter ones. Its loss begins at ln 2."""
    config, schedule = replace(CONFIG, layers=3), FlowSchedule()
    model, made = DiT(config), Discriminator(config)
    parameters = [*model.parameters(), *made.parameters()]
    optimiser = torch.optim.Adam(parameters, 3e-3)

    def batch() -> tuple[Any, tuple[Tensor, ...]]:
        noise = torch.randn(5, 8, 2, 4, 4, 4)
        t, text = torch.rand(8) * 500, torch.zeros(1, 1, 8)
        videos = 0.5 * noise[0] - 1, 0.5 * noise[1] + 1
        logit = functools.partial(logits, model, made, t_B=t, text_BTE=text)
        return logit, (*videos, noise[2], t, noise[3], noise[4])

    losses = []
    for _ in range(25):
        logit, (fake, real, noise, t, *steps) = batch()
        loss = gan.discriminator_loss(logit, fake, real, noise, t, schedule, *steps)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(0.6931, abs=1e-4)
    assert sum(losses[-5:]) / 5 < 0.1
    logit, (fake, real, noise, t, *_) = batch()
    shared = noise, t, schedule, torch.randn_like(noise)
    with torch.no_grad():  # videos that it has not seen
        assert gan.gan_generator_loss(logit, fake, real, *shared) > 2
        assert gan.gan_generator_loss(logit, real, fake, *shared) < 0.2


FEATURES = [*torch.zeros(3, 2, 7, CONFIG.dim)]


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: head()(FEATURES[:2]), "2 features: must be those of blocks \\(1, 2, 3\\)"),
        (lambda: head()([x[..., 1:] for x in FEATURES]), "features has shape \\[2, 7, 31\\]"),
        (lambda: head()([FEATURES[0], *(x[:1] for x in FEATURES[1:])]), "must be \\[2, L, 32\\]"),
        (lambda: Discriminator(CONFIG, 0), "registers=0: must be in 1..3"),
        (lambda: Discriminator(CONFIG, 4), "registers=4: must be in 1..3"),
        (lambda: backbone().features(*inputs(), (4,)), "keep=\\[4\\]: must be blocks in 0..3"),
        (lambda: backbone().features(*inputs(), (1, -1)), "keep=\\[1, -1\\]: must be blocks"),
    ],
)
def test_bad_input_says_what_is_wrong(call: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call()
