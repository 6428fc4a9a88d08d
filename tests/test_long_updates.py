"""Updates on rollouts longer than a clip, at exit steps of their own, and of videos that begin with
a given image: what is drawn, what the losses see, and what is refused."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from sfkernels import BlockLayout
from sfmodel.cli import main
from sfmodel.config import PRESETS
from sfmodel.toy.text import ToyTextEncoder
from sfmodel.toy.vae import ToyVAE
from sfmodel.train.batch import Batch, MicroBatch
from sfmodel.train.data import ToyWorld
from sfmodel.train.loop import Run, train
from sfmodel.train.objectives import Distillation
from sfmodel.train.objectives.gan import gan_generator_loss
from sfmodel.train.rollout import Rollout
from tests.test_recipes import ALONE, SCHEDULE, Call, Make, assert_close, gradients, load
from tests.test_recipes import make as make
from tests.tiny_runs import TINY, apart, config, draw_pictures, logged, saved, tiny, weights


def test_lengths_and_exit_steps_are_drawn(make: Make) -> None:
    def drawn(**change: Any) -> list[Batch]:
        context = make("sf+dmd", **change).context
        return [Batch.draw(context, step, "generator") for step in range(60)]

    for batch in drawn():
        assert (batch.rollout, batch.masked) == (4, 0)
        assert batch.exit_step is not None and {*batch.exit_steps} == {batch.exit_step}
    last = drawn(rollouts=(4, 10))
    assert {(b.rollout, b.masked) for b in last} == {(4, 0), (10, 1)}
    assert {len(b.exit_steps) for b in last} == {2, 4, 10}  # of chunks of 3 and of 1
    anywhere = drawn(rollouts=(10,), judged="random")
    assert {b.rollout for b in anywhere if b.chunk == 1} == {*range(4, 11)}
    assert {b.rollout for b in anywhere if b.chunk == 3} == {4, 7, 10}
    own = drawn(rollouts=(10,), same_step_across_blocks=False)
    assert all(b.exit_step is None for b in own)
    assert {step for b in own for step in b.exit_steps} == {0, 1, 2, 3}
    assert len({b.exit_steps for b in own if b.chunk == 3}) > 20
    three = drawn(first=3, frames=(6,), chunks=(3,), windows=(4,), rollouts=(6, 9))
    assert {(b.rollout, b.masked) for b in three} == {(6, 0), (9, 3)}
    again = drawn(rollouts=(10,), same_step_across_blocks=False)
    assert [b.exit_steps for b in own] == [b.exit_steps for b in again]
    for change in ({}, {"same_step_across_blocks": False}):
        assert {b.exit_step for b in drawn(last_step_only=True, **change)} == {3}


def rolled(run: Run, part: MicroBatch) -> Rollout:
    """The whole rollout of a micro-batch."""
    update, settings = part.batch, run.config
    layout = BlockLayout.causal(
        update.rollout, update.chunk, 4, first=run.preset.first, window=update.window,
        sink=settings.sink,
    )  # fmt: skip
    return Rollout(
        run.models.generator, layout, SCHEDULE, TINY.steps, update.exit_steps, part.chunk_noise,
        part.text_BTE, renoise_context=True, positions=settings.positions,
        still_BFCHW=part.clean_BFCHW[:, :1] if settings.image else None,
    )  # fmt: skip


def judged(run: Run, video: Tensor, frames: int) -> Tensor:
    """The last frames, the first of which is what all before it show in the end."""
    vae, last = ToyVAE.from_pretrained(), video.shape[1] - frames
    with torch.no_grad():
        pixels, _ = vae.decode_chunk(video[:, : last + 1])
        still, _ = vae.encode_chunk(pixels[:, -1:].clamp(-1, 1))
    return torch.cat([still, video[:, last + 1 :]], 1)


def loss_of(run: Run, part: MicroBatch, recipe: str, x0: Tensor, masked: int) -> Tensor:
    """The generator's loss of videos without their first frames."""
    _, real, fake, head = run.models
    of_1000 = (1000 * part.draw.uniform("score level")).floor() / 1000
    t = SCHEDULE.shifted(of_1000).clamp(0.02, 0.98) * 1000
    s, noise = SCHEDULE.sigma(t)[:, None, None, None, None], part.noise("score noise")
    assert fake is not None
    if head is not None:

        def logits(x_t: Tensor) -> Tensor:
            return head(fake.features(x_t, t, part.text_BTE, head.taps))

        given = part.clean_BFCHW, noise, t, SCHEDULE, part.noise("real noise")
        return gan_generator_loss(logits, x0, *given)
    assert real is not None
    x_t = (1 - s) * x0 + s * noise
    prompted, unprompted = real(x_t, t, part.text_BTE), real(x_t, t, torch.zeros(1, 1, 32))
    real_x0 = x_t - s * (prompted + 1.5 * (prompted - unprompted))
    fake_x0 = x_t - s * fake(x_t, t, part.text_BTE)
    size = (x0 - real_x0).detach().abs().mean((1, 2, 3, 4), keepdim=True)
    if recipe == "sf+sid":
        each = (real_x0 - fake_x0) * (fake_x0 - x0) / size
        return each[:, masked:].mean()
    direction = ((fake_x0 - real_x0) / size).detach()
    return (direction * x0)[:, masked:].mean()


@pytest.mark.parametrize("recipe", ["sf+dmd", "sf+sid", "sf+gan"])
@pytest.mark.parametrize(("first", "image"), [(1, False), (1, True), (3, False)])
def test_the_loss_sees_the_last_frames(recipe: str, first: int, image: bool, make: Make) -> None:
    """But for those of the first chunk."""
    frames = first + 3
    run = make(
        recipe, frames=(frames,), chunks=(3,), first=first, rollouts=(frames + 6,), windows=(4,),
        sink=1, positions="relative", image=image, same_step_across_blocks=False,
    )  # fmt: skip
    assert isinstance(run.objective, Distillation)
    part = load(run, 0, 2)
    whole = rolled(run, part)
    video = judged(run, whole.generate(), frames)
    got, _ = run.objective.generate(part)
    torch.testing.assert_close(got, video, rtol=1e-4, atol=1e-4)
    loss = run.objective.learn(part, 0.5)
    ours = gradients(run.models.generator)
    video.requires_grad_()
    want = loss_of(run, part, recipe, video, first)
    (upstream,) = torch.autograd.grad(0.5 * want, video)
    upstream[:, :first] = 0
    whole.backward(torch.cat([torch.zeros_like(got[:, :1]).repeat(1, 6, 1, 1, 1), upstream], 1))
    assert_close(gradients(run.models.generator), ours, 2e-3)
    if recipe != "sf+dmd":  # whose loss is half the square of what it is here
        assert loss == pytest.approx(want.item(), rel=1e-3)


def test_the_critic_sees_the_still_too(make: Make) -> None:
    run = make("sf+dmd", rollouts=(7,), min_sigma=None)
    part, critic = load(run, 0, 2), run.models.critic
    assert critic is not None and isinstance(run.objective, Distillation)
    call = Call(critic)
    loss = run.objective.learn_critic(part, 1.0)
    assert not gradients(run.models.generator)
    video, noise = judged(run, rolled(run, part).generate(), 4), part.noise("score noise")
    s = SCHEDULE.sigma(call.t)[:, None, None, None, None]
    torch.testing.assert_close(call.x, (1 - s) * video + s * noise, rtol=1e-4, atol=1e-4)
    assert loss == pytest.approx((call.flow - (noise - video)).square().mean().item(), rel=1e-3)


@pytest.mark.parametrize("recipe", ["sf+dmd", "sf+gan"])
def test_a_batch_is_the_mean_of_its_parts(recipe: str, make: Make) -> None:
    run = make(recipe, rollouts=(7,), image=True, same_step_across_blocks=False, drop_word=0.5)
    batch = Batch.draw(run.context, 1, "generator")
    run.objective.learn(batch.load(range(4)), 1.0)
    want = gradients(run.models.generator)
    for samples in (range(2), range(2, 4)):
        run.objective.learn(batch.load(samples), 0.5)
    assert_close(want, gradients(run.models.generator), 2e-3)


def test_a_resumed_run_is_the_one_that_was_not_stopped(tmp_path: Path) -> None:
    with tiny():
        whole, parts = (
            config(
                tmp_path / name, "sf+dmd", rollouts=(7, 10), judged="random", image=True, sink=1,
                windows=(4,), positions="relative", same_step_across_blocks=False,
            )
            for name in ("whole", "parts")
        )  # fmt: skip
        train(whole, device="cpu")
        train(replace(parts, steps=2), device="cpu")
        train(parts, resume=True, device="cpu")
    one, other = (saved(each.output / "checkpoints" / "step-000004") for each in (whole, parts))
    assert apart(one, other) == 0


@pytest.mark.parametrize("recipe", ["tf", "df", "tf+dmd", "df+sid", "ode"])
def test_a_given_image_is_clean_and_takes_no_loss(recipe: str, make: Make) -> None:
    run = make(recipe, image=True, min_sigma=None)
    call = Call(run.models.generator)
    for step in range(4):
        part = load(run, step, 2)
        loss = run.objective.learn(part, 1.0)
        clean = part.clean_BFCHW if part.points_BSFCHW is None else part.points_BSFCHW[:, -1]
        assert torch.equal(call.x[:, 0], clean[:, 0]) and (call.t[:, 0] == 0).all()
        assert (call.t[:, 1:] > 0).any()
        if recipe in ("tf", "df"):
            s = call.t[:, 1:] / 1000
            error = (call.flow - (part.noise("noise") - clean))[:, 1:].square().mean((2, 3, 4))
            want = (SCHEDULE.weight(1000 * s) * error).mean()
        elif recipe == "ode":
            s = SCHEDULE.sigma(call.t)[:, :, None, None, None]
            error = (call.x - s * call.flow - clean).square().mean((2, 3, 4))
            noisy = call.t > 0  # the others are context
            want = torch.stack(
                [e[n].sum() / max(n.sum(), 1) for e, n in zip(error, noisy, strict=True)]
            ).mean()
        else:
            assert isinstance(run.objective, Distillation)
            video, _ = run.objective.generate(part)
            assert torch.equal(video[:, 0], clean[:, 0])
            continue
        assert loss == pytest.approx(want.item(), rel=1e-3)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(rollouts=(3,)), "rollouts=(3,): each must be the 4 latent frames of a clip and a m"),
        (dict(rollouts=(4, 8)), "rollouts=(4, 8): each must be the 4 latent frames of a clip and"),
        (dict(rollouts=(0,)), "rollouts=(0,): must be at least 1"),
        (dict(recipe="df+gan", rollouts=(7,)), "recipe='df+gan' rolls nothing out"),
        (dict(rollouts=(7,), frames=(1, 4)), "frames=(1, 4): must be more than the 1 of the"),
        (dict(image=True, frames=(1,)), "frames=(1,): must be more than the 1 of the first chunk"),
        (dict(image=True, first=3, frames=(6,)), "image: is a first chunk of 1 latent frame, not"),
        (dict(recipe="bidirectional", image=True), "image: a bidirectional model has no first"),
        (dict(gradient_frames=2), "gradient_frames=2: must be at least the 3 latent frames of a"),
        (dict(first=0), "first=0: must be at least 1"),
    ],
)
def test_what_does_not_fit(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    with tiny(), pytest.raises(ValueError) as error:
        config(tmp_path / "run", **{"recipe": "sf+dmd", "chunks": (3,), **change})
    assert said in str(error.value)


def test_the_least_that_takes_a_gradient_learns(make: Make) -> None:
    run = make("sf+dmd", chunks=(3,), gradient_frames=3, rollouts=(7,))
    run.objective.learn(load(run, 0, 2), 1.0)
    assert gradients(run.models.generator)


def test_the_first_chunk_may_be_another_than_the_preset_s(tmp_path: Path) -> None:
    with tiny():
        assert config(tmp_path / "run").layout(4, 3, 4).chunks == (1, 3)
        run = config(tmp_path / "run", first=2, frames=(5,))
        assert run.layout(5, 3, 4).chunks == (2, 3) and run.model.first == 2


def test_other_models_need_their_vae(tmp_path: Path) -> None:
    source = ToyWorld(ToyVAE(), ToyTextEncoder())
    with tiny(), mock.patch.dict(PRESETS, {"wan-1.3b": TINY}):
        settings = config(
            tmp_path / "run", "sf+dmd", preset="wan-1.3b", rollouts=(7,), models=tmp_path
        )
        with pytest.raises(ValueError, match=r"holds no video VAE for wan-1.3b \(.*Wan2.1_VAE.pth"):
            Run(settings, ALONE, source=source)
        given: Any = {"vae": ToyVAE.from_pretrained(), "negative": torch.zeros(1, 1, 32)}
        run = Run(settings, ALONE, source=source, **given)
        assert run.train_step()["norm"] > 0


def test_it_trains_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And shows videos of given images."""
    folder = tmp_path / "run"
    with tiny():
        draw_pictures(monkeypatch)
        files = ["--init", weights(tmp_path / "init.safetensors", 1)]
        files += ["--teacher", weights(tmp_path / "teacher.safetensors", 2), "--output", folder]
        words = [*files, "--frames", 4, "--chunks", 1, 3, "--windows", 4, "--sink", 1, "--steps", 2]
        words += ["--batch", 2, "--critic-steps", 1, "--critic-warmup", 0, "--threads", 1]
        words += ["--rollouts", 10, "--judged", "random", "--image", "--log-every", 1]
        words += ["--no-same-step-across-blocks", "--gradient-frames", 3]
        monkeypatch.setattr(
            sys, "argv", ["sfmodel", "train", "--recipe", "sf+dmd", *map(str, words)]
        )
        main.main()
    settings = json.loads((folder / "config.json").read_text())
    assert settings["rollouts"] == [10] and settings["image"]
    assert settings["positions"] == "relative"
    assert all(line["norm"] > 0 for line in logged(folder))
    assert (folder / "samples" / "update-000002.png").stat().st_size > 1000
