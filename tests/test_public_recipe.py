"""The arithmetic of the public Self Forcing trainer, written again, beside what a run computes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfmodel.ranks import Ranks
from sfmodel.schedule import FlowSchedule
from sfmodel.train.batch import Batch, MicroBatch
from sfmodel.train.discriminator import Discriminator, logits
from sfmodel.train.loop import Run, Stopped
from sfmodel.train.objectives import Distillation, ode, score_timesteps
from sfmodel.train.trajectories import solve
from sfmodel.weights import checkpoint
from tests.tiny_runs import TINY, config, flat, tiny

Make = Callable[..., Run]
STEPS = 1000, 750, 500, 250


class Table:
    """σ and t of 1000 training steps, falling, in double precision."""

    def __init__(self, shift: float) -> None:
        self.sigmas = [shift * k / (1000 + (shift - 1) * k) for k in range(1000, 0, -1)]

    def sigma(self, t: Tensor | float) -> Tensor:
        """Of the nearest t [...]; float32."""
        table = torch.tensor(self.sigmas, dtype=torch.float64)
        t = torch.as_tensor(t, dtype=torch.float64)
        return table[(1000 * table - t[..., None]).abs().argmin(-1)].float()


def public_timestep(k: int, shift: float) -> float:
    """t at which scores compare, of an index in 0..999."""
    t = shift * (k / 1000) / (1 + (shift - 1) * (k / 1000)) * 1000
    return min(max(t, 20.0), 980.0)


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """A run, of which discriminators say something."""

    def made(recipe: str, folder: str = "run", **change: Any) -> Run:
        run = Run(config(tmp_path / folder, recipe, **change), Ranks(0, 1, torch.device("cpu")))
        if run.models.discriminator is not None:
            nn.init.constant_(run.models.discriminator.logit.weight, 0.3)
        run.prepare()
        return run

    with tiny():
        yield made


def load(run: Run, step: int = 0, samples: int = 2) -> MicroBatch:
    return Batch.draw(run.context, step, "generator").load(range(samples))


def test_the_average_over_120_updates(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy after 200 of the critic's iterations, which are 40 of ours; .99 from then on."""
    run = make("tf", ema=0.99, ema_start=40, steps=120)
    value = [1 / (n + 3) for n in range(120)]  # that of every weight after an update

    def update(which: str, batch: Batch, rate: float) -> dict[str, float]:
        for parameter in run.models.generator.parameters():
            nn.init.constant_(parameter, value[run.step])
        return {}

    monkeypatch.setattr(run, "update", update)
    want = 0.0
    for iteration in range(600):
        if iteration % 5 == 0:
            run.train_step()
            want = 0.99 * want + 0.01 * value[iteration // 5]
        if iteration < 200:
            want = value[iteration // 5]  # there is no average yet: the copy to come
    run._save_weights()
    averaged, _ = checkpoint.read(run.config.weights)
    for weights in averaged.values():
        torch.testing.assert_close(weights, torch.full_like(weights, want), rtol=1e-5, atol=0)
    assert pytest.approx(0.4475, abs=1e-4) == 0.99**80
    assert want == pytest.approx(
        0.99**80 * value[39] + sum(0.01 * 0.99 ** (119 - n) * value[n] for n in range(40, 120))
    )


class Grid(NamedTuple):
    """In place of a draw: all of [0, 1) in even steps."""

    size: int

    def uniform(self, name: str) -> Tensor:
        return (torch.arange(self.size) + 0.5) / self.size


@pytest.mark.parametrize(
    ("change", "ranges"),
    [
        ({}, [(0, 1000)] * 4),
        ({"min_score_timestep": 100}, [(100, 1000)] * 4),
        ({"ts_schedule": True}, [(550, 1000), (250, 1000), (100, 1000), (0, 1000)]),
        ({"ts_schedule_max": True}, [(0, 1000), (0, 550), (0, 250), (0, 100)]),
        (
            {"ts_schedule": True, "ts_schedule_max": True, "min_score_timestep": 300},
            [(550, 1000), (250, 550), (100, 250), (0, 100)],
        ),
    ],
)
@pytest.mark.parametrize("recipe", ["sf+dmd", "sf+gan", "tf+dmd"])
def test_levels_of_scores(
    recipe: str, change: dict[str, Any], ranges: list[tuple[int, int]], make: Make
) -> None:
    """Integers of the range of each exit step, (1000, 550, 250, 100) in the toy; without one, all
    from the setting on."""
    run = make(recipe, **change)
    assert isinstance(run.objective, Distillation) and TINY.steps == (1000, 550, 250, 100)
    seen = set()
    for step in range(24):
        part = load(run, step, 1)
        if recipe == "tf+dmd":
            least, end = change.get("min_score_timestep", 0), 1000
        else:
            assert part.batch.exit_step is not None
            least, end = ranges[part.batch.exit_step]
            seen.add(part.batch.exit_step)
        grid: Any = Grid(3 * (end - least))
        want = [public_timestep(k, TINY.shift) for k in range(least, end) for _ in range(3)]
        got = run.objective.timesteps(part._replace(draw=grid))
        torch.testing.assert_close(got, torch.tensor(want), rtol=1e-5, atol=1e-4)
    assert recipe == "tf+dmd" or seen == {0, 1, 2, 3}


def test_levels_of_scores_are_those_of_the_table() -> None:
    """σ is t/1000, but for the two ends."""
    schedule = FlowSchedule(5.0)
    t = score_timesteps(torch.arange(1000) / 1000 + 1e-5, schedule)
    inside = (t > 20) & (t < 980)
    assert int((t == 20).sum()) == 5 and int((t == 980).sum()) == 92
    torch.testing.assert_close(schedule.sigma(t)[inside], t[inside] / 1000, rtol=1e-6, atol=0)
    assert float(schedule.sigma(t[0])) == pytest.approx(20 / 1016)


def test_how_far_apart_the_tables_of_shift_5_and_8_are() -> None:
    """At the levels that scores compare at: the numbers of docs/recipe.md."""
    t = torch.tensor([public_timestep(k, 5.0) for k in range(1000)], dtype=torch.float64)
    apart = (Table(8.0).sigma(t).double() / Table(5.0).sigma(t).double() - 1).abs()
    assert float(apart.mean()) == pytest.approx(0.0024, abs=5e-5)
    assert int((apart > 0.01).sum()) == 34 and float(t[apart > 0.01].max()) < 250
    assert float(apart.max()) == pytest.approx(0.194, abs=5e-4) and t[apart.argmax()] == 20


@pytest.mark.parametrize(("shift", "fake_scale"), [(None, 1.0), (8.0, 1.0), (8.0, 2.5)])
def test_scores_have_a_table_of_their_own(
    shift: float | None, fake_scale: float, make: Make
) -> None:
    """x is noised by the generator's; x0 and the critic's flow are by the scores'. Guidance is
    c + g·(c − u) there, which ours counts as u + (g + 1)·(c − u)."""
    run = make("sf+dmd", score_shift=shift, fake_guidance_scale=fake_scale, guidance_scale=4.0)
    part, own, theirs = load(run), Table(TINY.shift), Table(shift or TINY.shift)
    real, fake = run.models.real, run.models.critic
    assert real is not None and fake is not None and isinstance(run.objective, Distillation)
    part = part._replace(draw=_Level(part.draw))  # type: ignore[arg-type]
    t = run.objective.timesteps(part)
    assert t.tolist() == pytest.approx([public_timestep(7, TINY.shift)] * 2)
    noise = part.noise("score noise")
    video = torch.randn_like(noise)
    s = own.sigma(t)[:, None, None, None, None]
    s_theirs = theirs.sigma(t)[:, None, None, None, None]
    assert (not torch.equal(s, s_theirs)) == (shift is not None)
    x_t = (1 - s) * video + s * noise
    with torch.no_grad():
        want = []
        for score, scale in ((real, 3.0), (fake, fake_scale - 1)):
            c, u = (x_t - s_theirs * score(x_t, t, text) for text in
                    (part.text_BTE, run.context.negative_1TE))  # fmt: skip
            want.append(c + scale * (c - u))
        got = run.objective.score(part)(video)  # type: ignore[attr-defined]
        flow = (x_t - (x_t - s_theirs * fake(x_t, t, part.text_BTE))) / s
        weight = (t / 1000 / 0.3).clamp(max=1).square()[:, None, None, None, None]
        critic = (weight * (flow - (noise - video)).square()).mean()
        assert run.objective.critic_loss(part, video).item() == pytest.approx(critic.item(), 1e-4)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


class _Level:
    """A draw whose noise level is the seventh."""

    def __init__(self, draw: Any) -> None:
        self.draw = draw

    def uniform(self, name: str) -> Tensor:
        return torch.full((2,), 0.0075)

    def normal(self, name: str, *shape: int) -> Tensor:
        return self.draw.normal(name, *shape)


@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_sid_has_its_alpha(alpha: float, make: Make) -> None:
    run = make("sf+sid", sid_alpha=alpha)
    part = load(run)
    assert isinstance(run.objective, Distillation)
    video = torch.randn(part.noise("noise").shape)
    with torch.no_grad():
        real, fake = (x.double() for x in run.objective.score(part)(video))  # type: ignore[attr-defined]
        x = video.double()
        loss = (real - fake) * ((real - x) - alpha * (real - fake))
        want = (loss / (x - real).abs().mean((1, 2, 3, 4), keepdim=True)).mean()
        assert run.objective.generator_loss(part, video).item() == pytest.approx(want.item(), 1e-4)


def test_the_gan_s_noises_and_penalties(make: Make) -> None:
    """The generator's loss draws noise twice, the discriminator's once; R1 and R2 are halved."""
    run = make("sf+gan", gan_penalty=7.0, gan_sigma=0.1)
    part, (_, _, critic, head) = load(run), run.models
    assert isinstance(run.objective, Distillation) and critic is not None and head is not None
    t = run.objective.timesteps(part)
    s = Table(TINY.shift).sigma(t)[:, None, None, None, None]
    noise, other = part.noise("score noise"), part.noise("real noise")
    assert not torch.equal(noise, other)
    real, fake = part.clean_BFCHW, torch.randn_like(noise)

    def logit(x_t: Tensor) -> Tensor:
        return logits(critic, head, x_t, t, part.text_BTE)

    with torch.no_grad():
        ahead = logit((1 - s) * fake + s * noise) - logit((1 - s) * real + s * other)
        want = F.softplus(-ahead).mean()
        assert run.objective.generator_loss(part, fake).item() == pytest.approx(want.item(), 1e-5)
        real_t, fake_t = ((1 - s) * x + s * noise for x in (real, fake))
        loss = F.softplus(-(logit(real_t) - logit(fake_t))).mean()
        for x_t, step in zip(
            (fake_t, real_t), part.noise("perturbation", 2).unbind(1), strict=True
        ):
            slope = (logit(x_t + 0.1 * step) - logit(x_t)) / 0.1
            loss = loss + 0.5 * 7.0 * slope.square().mean()
        assert run.objective.critic_loss(part, fake).item() == pytest.approx(loss.item(), 1e-4)


def test_registers_have_size_one() -> None:
    """What attends to the first block's hidden states, whatever the tokens learn."""
    head = Discriminator(TINY.dit)
    assert head.tokens.std().item() == pytest.approx(0.02, rel=0.4)
    assert head.token_norm.eq(1).all()
    given: list[Tensor] = []
    head.readers[0].register_forward_pre_hook(lambda _, args: given.append(args[0]))
    features = [torch.randn(2, 5, TINY.dit.dim)]
    for scale in (1.0, 100.0):
        with torch.no_grad():
            head.tokens.mul_(scale)
        head(features)
    want = head.tokens[0] / head.tokens[0].square().mean().sqrt()
    for token in given:
        torch.testing.assert_close(token, want.expand(2, 1, -1), rtol=1e-2, atol=1e-3)


def test_clean_chunks_do_not_count() -> None:
    """With one clip a rank, as the public trainer has them, its mean over what is not at t = 0; of
    several the mean of these. A clip that is all clean counts nothing, where the public mean is
    NaN."""
    x, clean = torch.randn(2, 3, 5, 4, 2, 2)
    t = torch.tensor([[1000.0, 0, 0, 625, 625], [0, 0, 0, 833.3333, 833.3333], [0, 0, 0, 0, 0]])

    def model(x: Tensor, t: Tensor, text: Tensor, **_: Any) -> Tensor:
        return 0.3 * x

    table = Table(5.0)
    pred = x - table.sigma(t)[:, :, None, None, None] * 0.3 * x
    parts = [F.mse_loss(pred[i][t[i] != 0], clean[i][t[i] != 0]) for i in range(2)]
    shared: Any = torch.zeros(1, 1, 3), None, FlowSchedule(5.0)
    got = [ode.ode_regression_loss(model, x[i:][:1], t[i:][:1], clean[i:][:1], *shared)  # type: ignore[arg-type]
           for i in range(3)]  # fmt: skip
    torch.testing.assert_close(torch.stack(got), torch.stack([*parts, torch.zeros(())]))
    whole = ode.ode_regression_loss(model, x, t, clean, *shared)  # type: ignore[arg-type]
    torch.testing.assert_close(whole, torch.stack(got).mean())


def test_trajectories_of_48_steps_at_shift_8() -> None:
    """The public points of a trajectory lie at its own levels; ours on the same line where the
    few-step model stands."""
    noise = torch.randn(1, 1, 1, 2, 2)
    s = [1 - i / 48 for i in range(49)]
    sigmas = [8 * v / (1 + 7 * v) for v in s]
    x, path = noise.double(), [noise.double()]
    for now, then in itertools.pairwise(sigmas):
        x = x + (then - now) * (0.7 * x + 0.1 * now)
        path.append(x)
    stored = [sigmas[i] for i in (0, 12, 24, 36)]
    assert stored == pytest.approx(
        [1.0, 0.96, 8 / 9, 8 / 11]
    )  # for labels of 1, .9375, .8333, .625
    points = solve(
        lambda x, t: 0.7 * x + 0.1 * t / 1000, noise, FlowSchedule(5.0), STEPS, 48, shift=8.0
    )
    for k, level in enumerate((1.0, 0.9375, 5 / 6, 0.625)):
        i = max(i for i in range(48) if sigmas[i] >= level)
        share = (sigmas[i] - level) / (sigmas[i] - sigmas[i + 1])
        want = (1 - share) * path[i] + share * path[i + 1]
        torch.testing.assert_close(points[:, k].double(), want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(points[:, -1].double(), path[-1], rtol=1e-4, atol=1e-4)


def groups(optimizer: torch.optim.Optimizer) -> list[tuple[float, Any, float, int]]:
    """Learning rate, betas, weight decay and least number of dimensions of what has some."""
    found = []
    for group in optimizer.param_groups:
        dims = min(2, min(p.dim() for p in group["params"]))
        found.append((round(group["lr"], 9), group["betas"], group["weight_decay"], dims))
    return found


def test_optimisers_of_the_generator_the_critic_and_the_discriminator(make: Make) -> None:
    run = make(
        "sf+gan", lr=1e-3, lr_critic=4e-4, betas=(0.1, 0.9), betas_critic=(0.2, 0.95), warmup=0,
        clip=3.0, clip_critic=0.5, discriminator_lr_multiplier=2.5, weight_decay=0.02,
    )  # fmt: skip
    run.train_step()
    generator, critic = run.learners["generator"], run.learners["critic"]
    (adamw,) = generator.optimizers
    assert groups(adamw) == [(1e-3, (0.1, 0.9), 0.02, 2), (1e-3, (0.1, 0.9), 0.0, 1)]
    backbone, head = critic.optimizers
    for optimizer, rate in ((backbone, 4e-4), (head, 1e-3)):
        betas = (0.2, 0.95)
        assert groups(optimizer) == [(rate, betas, 0.02, 2), (rate, betas, 0.0, 1)]
    assert generator.clip == 3.0 and critic.clip == 0.5
    for parameter in critic.parameters:
        parameter.grad = torch.ones_like(parameter)
    assert critic.norm() == pytest.approx(math.sqrt(sum(p.numel() for p in critic.parameters)))
    norms = [p.grad.norm() for p in critic.parameters if p.grad is not None]
    assert float(torch.stack(norms).norm()) == pytest.approx(0.5, rel=1e-4)
    alike = make("sf+gan", "alike", betas=(0.1, 0.9), clip=3.0).learners["critic"]
    assert alike.clip == 3.0 and alike.betas == (0.1, 0.9)  # the generator's, where none are given


def changed(run: Run, before: dict[str, Tensor]) -> set[str]:
    """Which of the critic and its head are not as before, and notes them as they are."""
    now = {name: p.detach().clone() for name, p in run.learners["critic"].whole.named_parameters()}
    parts = {name.partition(".")[0] for name, p in now.items() if before.get(name) is None
             or not torch.equal(p, before[name])}  # fmt: skip
    before.update(now)
    return parts


def test_the_discriminator_warms_up_alone(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """By β1 = .9; then the optimisers start anew, and the generator learns at last."""
    run = make("sf+gan", discriminator_warmup=3, critic_warmup=1, critic_steps=2, betas=(0.0, 0.99))
    weights: dict[str, Tensor] = {}
    changed(run, weights)
    seen = []
    update = run.update

    def noted(which: str, batch: Batch, rate: float = 1.0) -> dict[str, float]:
        record = update(which, batch, rate)
        backbone, head = run.learners["critic"].optimizers
        steps = [int(next(iter(o.state.values()))["step"]) if o.state else 0 for o in
                 (backbone, head)]  # fmt: skip
        seen.append((which, changed(run, weights), head.param_groups[0]["betas"], *steps))
        return record

    monkeypatch.setattr(run, "update", noted)
    run.train_step()
    run.train_step()
    both = {"critic", "discriminator"}
    assert seen == [
        *(("critic", {"discriminator"}, (0.9, 0.99), 0, n) for n in (1, 2, 3)),
        *(("critic", both, (0.0, 0.99), n, n) for n in (1, 2, 3)),
        ("generator", set(), (0.0, 0.99), 3, 3),
        *(("critic", both, (0.0, 0.99), n, n) for n in (4, 5)),
        ("generator", set(), (0.0, 0.99), 5, 5),
    ]


@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_a_warm_up_goes_on_where_it_was_stopped(stop: int, make: Make) -> None:
    """After so many of its updates, of which two are the head's alone."""
    settings: Any = {"discriminator_warmup": 2, "critic_warmup": 1, "micro_batch": 4}
    whole = make("sf+gan", **settings)
    want = whole.train_step()
    first, calls = make("sf+gan", **settings), itertools.count()
    first.asked = lambda: next(calls) == stop
    with pytest.raises(Stopped):
        first.train_step()
    assert len(first.of_critic) == stop
    first.save()
    second = make("sf+gan", **settings)
    second.resume()
    assert second.train_step() == want
    one, other = flat(whole.state()), flat(second.state())
    assert one.keys() == other.keys() and len(one) > 100
    for name, value in one.items():
        same = (
            torch.equal(value, other[name]) if isinstance(value, Tensor) else value == other[name]
        )
        assert same, name
