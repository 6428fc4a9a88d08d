"""What an update computes: the parts of a batch, what the model sees, and the trajectories."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sfkernels import BlockLayout
from sfmodel.dit import DiT
from sfmodel.ranks import Ranks
from sfmodel.schedule import FlowSchedule
from sfmodel.train import objectives
from sfmodel.train.batch import Batch, Draw, MicroBatch, seed_of
from sfmodel.train.config import RECIPES
from sfmodel.train.loop import Run
from sfmodel.train.rollout import Rollout
from sfmodel.train.trajectories import IN_FILE, Trajectories, solve
from tests.tiny_runs import TINY, config, tiny

ALONE = Ranks(0, 1, torch.device("cpu"))
SCHEDULE = FlowSchedule(TINY.shift)
DISTILLED = [name for name, objective in RECIPES.items() if objective.needs_critic]

Make = Callable[..., Run]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """A run whose discriminator, if there is one, says something."""

    def made(recipe: str, **change: Any) -> Run:
        run = Run(config(tmp_path / "run", recipe, **change), ALONE)
        if run.models.discriminator is not None:
            generator = torch.Generator().manual_seed(3)
            nn.init.normal_(run.models.discriminator.logit.weight, generator=generator)
        run.prepare()
        return run

    with tiny():
        yield made


def load(run: Run, step: int, samples: int) -> MicroBatch:
    """The first samples of a batch of the generator."""
    return Batch.draw(run.context, step, "generator").load(range(samples))


class Call:
    """What a model was called with last, and what it said."""

    def __init__(self, model: DiT) -> None:
        self.count = 0
        model.register_forward_hook(self._note, with_kwargs=True)

    def _note(self, _: nn.Module, given: Any, named: dict[str, Any], flow: Tensor) -> None:
        self.count += 1
        self.x, self.t, _ = given
        self.layout: BlockLayout | None = named.get("layout")
        self.clean: Tensor | None = named.get("clean_BFCHW")
        self.flow = flow


def gradients(*models: nn.Module | None) -> dict[str, Tensor]:
    """Those that models have, which they have no longer."""
    found = {}
    for i, model in enumerate(models):
        for name, parameter in model.named_parameters() if model is not None else ():
            if parameter.grad is not None:
                found[f"{i}/{name}"], parameter.grad = parameter.grad, None
    return found


def assert_close(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float) -> None:
    """Relative to the norm of each."""
    assert one.keys() == other.keys() and len(one) > 20
    for name, value in one.items():
        assert (value - other[name]).norm() <= tolerance * value.norm(), name


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_batch_is_the_mean_of_its_parts(recipe: str, make: Make) -> None:
    """Also of parts that end in shorter prompts."""
    run = make(recipe, drop_word=0.5)
    models = run.models.generator, run.models.critic, run.models.discriminator
    for name in ("learn", "learn_critic")[: 1 + RECIPES[recipe].needs_critic]:
        learn, batch = getattr(run.objective, name), Batch.draw(run.context, 1, name)
        whole = learn(batch.load(range(4)), 1.0)
        want = gradients(*models)
        halves = [learn(batch.load(samples), 0.5) for samples in (range(2), range(2, 4))]
        # Relative to the parts, which may cancel.
        assert sum(halves) / 2 == pytest.approx(whole, abs=1e-4 * max(map(abs, halves)))
        assert abs(halves[0] - halves[1]) > 1e-6 * abs(whole)
        assert_close(want, gradients(*models), 2e-3 if "gan" in recipe else 1e-4)
        learned = {key.partition("/")[0] for key in want}
        critics = {"1", "2"} if "gan" in recipe else {"1"}
        assert learned == ({"0"} if name == "learn" else critics)


def test_what_an_update_shares_is_drawn_anew_for_each(make: Make) -> None:
    setting = make("sf+dmd", frames=(1, 4), chunks=(1, 3), windows=(3, 4)).context
    updates = [Batch.draw(setting, step, "generator") for step in range(60)]
    assert {u.exit_step for u in updates} == {0, 1, 2, 3}
    assert {(u.frames, u.chunk, u.window) for u in updates} == {
        (f, c, w) for f in (1, 4) for c in (1, 3) for w in (3, 4)
    }
    assert {(u.frames, u.clips) for u in updates} == {(1, 16), (4, 4)}
    again = [Batch.draw(setting, step, "generator") for step in range(60)]
    other = [Batch.draw(setting, step, "critic 0") for step in range(60)]
    for name in ("seed", "exit_step", "frames"):
        drawn = [[getattr(u, name) for u in each] for each in (updates, again, other)]
        assert drawn[0] == drawn[1] != drawn[2]


def test_all_parts_of_an_update_exit_at_the_same_step(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make("sf+dmd", micro_batch=1, critic_warmup=0, critic_steps=2)
    exits: list[Sequence[int]] = []

    class Watched(Rollout):
        def __init__(self, *arguments: Any, **more: Any) -> None:
            super().__init__(*arguments, **more)
            exits.append(self.exit_steps)

    monkeypatch.setattr(objectives, "Rollout", Watched)
    for _ in range(4):
        run.train_step()
    assert len(exits) == 4 * 3 * 4
    assert all(len({*steps}) == 1 for steps in exits)
    groups = [{*exits[i : i + 4]} for i in range(0, len(exits), 4)]
    assert all(len(group) == 1 for group in groups) and len(set.union(*groups)) > 2


@pytest.mark.parametrize("recipe", ["tf+dmd", "df+dmd"])
def test_what_chunks_see_of_the_others(recipe: str, make: Make) -> None:
    """Clean ones, or ones as noisy as they are; each chunk at one of the few steps."""
    run = make(recipe, chunks=(1,), windows=(3,))
    call = Call(run.models.generator)
    seen = set()
    t_S = SCHEDULE.warp(TINY.steps)
    for step in range(6):
        part = load(run, step, 4)
        run.objective.learn(part, 1.0)
        assert call.layout is not None and part.clean_BFCHW is not None
        clean = recipe == "tf+dmd"
        assert call.layout == BlockLayout.causal(4, 1, 4, first=1, window=3, teacher_forcing=clean)
        assert (call.clean is not None) == clean
        assert call.clean is None or torch.equal(call.clean, part.clean_BFCHW)
        # The same noise at whatever step, which is all that x is made of beside the clip.
        noise = part.noise("noise")
        sigma = (call.t / 1000)[:, :, None, None, None]
        torch.testing.assert_close(call.x, (1 - sigma) * part.clean_BFCHW + sigma * noise)
        seen |= {*call.t.flatten().tolist()}
        assert any(len({*row.tolist()}) > 1 for row in call.t)  # chunks have their own
    assert seen == {*t_S.tolist()}


def test_the_gradient_of_distribution_matching_on_real_context(make: Make) -> None:
    """By autograd through everything, from (fake − real) / mean|x − real|."""
    run = make("tf+dmd")
    generator, real, fake, _ = run.models
    assert real is not None and fake is not None
    call = Call(generator)
    part = load(run, 0, 4)
    loss = run.objective.learn(part, 0.25)
    got = gradients(generator, fake)
    x0 = call.x - (call.t / 1000)[:, :, None, None, None] * call.flow
    k = (1000 * part.draw.uniform("score level")).floor()
    t = SCHEDULE.shifted(k / 1000).clamp(0.02, 0.98) * 1000
    noise = part.noise("score noise")
    s = SCHEDULE.sigma(t)[:, None, None, None, None]
    with torch.no_grad():
        x_t = (1 - s) * x0 + s * noise
        nothing = torch.zeros(4, 1, 32)
        prompted = real(x_t, t, part.text_BTE)
        real_x0 = x_t - s * (prompted + 1.5 * (prompted - real(x_t, t, nothing)))
        fake_x0 = x_t - s * fake(x_t, t, part.text_BTE)
        size = (x0 - real_x0).abs().mean((1, 2, 3, 4), keepdim=True)
        direction = (fake_x0 - real_x0) / size
    # The graph of the first pass is gone.
    flow = generator(call.x, call.t, part.text_BTE, layout=call.layout, clean_BFCHW=call.clean)
    x0 = call.x - (call.t / 1000)[:, :, None, None, None] * flow
    (0.25 * (direction * x0).mean()).backward()
    assert_close(gradients(generator, fake), got, 1e-3)
    assert loss == pytest.approx(0.5 * direction.square().mean().item(), rel=1e-3)


@pytest.mark.parametrize("recipe", ["tf+sid", "df+sid", "tf+gan", "df+dmd"])
def test_the_gradient_goes_through_the_whole_loss(recipe: str, make: Make) -> None:
    """That of the video and that of the generator are those of one graph."""
    run = make(recipe)
    assert isinstance(run.objective, objectives.Distillation)
    part = load(run, 0, 4)
    loss = run.objective.learn(part, 1.0)
    got = gradients(run.models.generator)
    video, _ = run.objective.generate(part)
    whole = run.objective.generator_loss(part, video)
    assert whole.item() == pytest.approx(loss)
    whole.backward()
    assert_close(gradients(run.models.generator), got, 1e-4)


@pytest.mark.parametrize("recipe", DISTILLED)
def test_the_critic_learns_from_what_the_generator_makes_now(recipe: str, make: Make) -> None:
    run = make(recipe)
    batch = Batch.draw(run.context, 0, "critic 0")
    before = run.objective.learn_critic(batch.load(range(4)), 1.0)
    assert not gradients(run.models.generator)
    with torch.no_grad():
        run.models.generator.head.head.bias.add_(1.0)
    assert run.objective.learn_critic(batch.load(range(4)), 1.0) != pytest.approx(before, rel=1e-4)


@pytest.mark.parametrize("recipe", ["tf", "df", "tf+dmd", "sf+dmd"])
def test_the_first_chunk_is_hidden_from_the_last(recipe: str, make: Make) -> None:
    """In clips that have more than it."""
    for hide in (False, True):
        run = make(recipe, hide_first=hide, chunks=(1,), frames=(1, 4), windows=(4,))
        layouts = set()
        for step in range(8):
            part = load(run, step, 1)
            layouts.add(part.batch.layout)
        first = {layout.frames: layout.rows[-1].keys[0][0] for layout in layouts}
        if recipe.startswith("tf"):
            assert first == {1: 4, 4: 4 if hide else 0}  # the clean frame comes before
        else:
            assert first == {1: 0, 4: 4 if hide else 0}


def test_rollouts_have_the_layout_of_the_update(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make("sf+dmd", hide_first=True, gradient_frames=2, chunks=(1,), sink=1, windows=(3,))
    made: list[Rollout] = []

    class Watched(Rollout):
        def __init__(self, *arguments: Any, **more: Any) -> None:
            super().__init__(*arguments, **more)
            made.append(self)
            noisy.append(self.renoise_context)

    noisy: list[bool] = []
    monkeypatch.setattr(objectives, "Rollout", Watched)
    run.objective.learn(load(run, 0, 2), 1.0)
    want = BlockLayout.causal(4, 1, 4, first=1, window=3, sink=1, hide_first=True)
    assert made[0].layout == want and noisy == [True]
    assert made[0].with_gradient == [False, False, True, True]
    other = make("sf+dmd", renoise_context=False)
    other.objective.learn(load(other, 0, 2), 1.0)
    assert all(made[1].with_gradient) and noisy == [True, False]


@pytest.mark.parametrize("recipe", ["bidirectional", "tf", "df"])
@pytest.mark.parametrize("min_sigma", [None, 0.3])
def test_flow_matching(recipe: str, min_sigma: float | None, make: Make) -> None:
    run = make(recipe, min_sigma=min_sigma)
    call = Call(run.models.generator)
    part = load(run, 3, 4)
    loss = run.objective.learn(part, 1.0)
    assert call.layout is not None
    noise, sigma = part.noise("noise"), call.t / 1000
    s = sigma[:, :, None, None, None]
    torch.testing.assert_close(call.x, (1 - s) * part.clean_BFCHW + s * noise)
    weight = SCHEDULE.weight(call.t) if min_sigma is None else (sigma / 0.3).clamp(max=1) ** 2
    error = (call.flow - (noise - part.clean_BFCHW)).square().mean((2, 3, 4))
    assert loss == pytest.approx((weight * error).mean().item(), rel=1e-3)
    assert call.layout.chunks == (4,) or recipe != "bidirectional"
    assert all(len({*row.tolist()}) == len(call.layout.chunks) for row in call.t)
    assert (call.clean is not None) == call.layout.teacher_forcing == (recipe == "tf")
    assert call.clean is None or torch.equal(call.clean, part.clean_BFCHW)


def test_context_may_be_dark_and_noisy(make: Make) -> None:
    run = make("tf", darken=0.5, context_noise=0.4)
    assert run.context.dark_CHW is not None
    dark, call = run.context.dark_CHW, Call(run.models.generator)
    part = load(run, 0, 4)
    loss = run.objective.learn(part, 1.0)
    noise, s = part.noise("noise"), (call.t / 1000)[:, :, None, None, None]
    share = part.draw.uniform("fade", 2)[:, :, None, None, None, None]
    missing = dark - part.clean_BFCHW
    seen, context = (part.clean_BFCHW + 0.5 * share[:, i] * missing for i in (0, 1))
    torch.testing.assert_close(call.x, (1 - s) * seen + s * noise)
    level = 0.4 * part.draw.uniform("context level")[:, None, None, None, None]
    context = context + level * part.noise("context noise")
    torch.testing.assert_close(call.clean, context)
    x0 = call.x - s * call.flow
    want = ((x0 - part.clean_BFCHW) / s.clamp(min=0.3)).square().mean()  # of the clip as it is
    assert loss == pytest.approx(want.item(), rel=1e-3)


def test_regression_starts_from_the_teacher_s_trajectories(make: Make) -> None:
    """Each chunk at one of the steps; without clean context also already clean."""
    run = make("ode", chunks=(1,))
    call = Call(run.models.generator)
    t_S = [*SCHEDULE.warp(TINY.steps).tolist(), 0.0]
    seen: dict[bool, set[int]] = {False: set(), True: set()}
    chosen = set()
    for step in range(12):
        part = load(run, step, 4)
        loss = run.objective.learn(part, 1.0)
        assert part.points_BSFCHW is not None and call.layout is not None
        clean, forcing = part.points_BSFCHW[:, -1], step % 2 == 1
        assert call.layout.teacher_forcing == forcing
        assert (call.clean is not None) == forcing
        assert call.clean is None or torch.equal(call.clean, clean)
        for b, f in ((b, f) for b in range(4) for f in range(4)):
            k = t_S.index(call.t[b, f].item())
            assert torch.equal(call.x[b, f], part.points_BSFCHW[b, k, f])
            seen[forcing].add(k)
        s = SCHEDULE.sigma(call.t)[:, :, None, None, None]
        error = (call.x - s * call.flow - clean).square().mean((2, 3, 4))
        want = [e[t != 0].mean().item() for e, t in zip(error, call.t, strict=True) if t.any()]
        assert loss == pytest.approx(sum(want) / 4, rel=1e-4)
        chosen |= {row.sum().item() for row in part.points_BSFCHW}
    assert seen == {False: {0, 1, 2, 3, 4}, True: {0, 1, 2, 3}}
    assert len(chosen) == 6  # all that there are


def test_trajectories_are_those_of_the_teacher(make: Make) -> None:
    run = make("ode", guidance_scale=1.5, pairs=3)
    points, text = run.context.trajectories.draw([2, 0])
    teacher = run.models.real
    assert teacher is not None and points.shape == (2, 5, 4, 4, 8, 8)
    assert points[:, 0].std() == pytest.approx(1, abs=0.1)
    with torch.no_grad():
        flows = [lambda x, t, p=p: teacher(x, t, p) for p in (text, torch.zeros(1, 1, 32))]
    options: Any = {"unprompted": flows[1], "guidance": 1.5}
    again = solve(flows[0], points[:, 0], SCHEDULE, TINY.steps, 20, **options)
    torch.testing.assert_close(again, points, rtol=1e-4, atol=1e-4)
    prompts = run.source.draw(seed_of(0, "trajectories"), 3, 4, latents=False)
    assert torch.equal(text, prompts.text_BTE[[2, 0]])


@pytest.mark.parametrize("euler_steps", [20, 40, 1000])
def test_a_linear_flow_against_its_closed_form(euler_steps: int) -> None:
    """dx/dσ = a·x: each Euler step is a factor 1 + a·Δσ, in the limit exp(a·(σ − 1))."""
    noise = torch.randn(2, 1, 1, 2, 2)
    asked: list[float] = []

    def flow(x: Tensor, t: Tensor) -> Tensor:
        asked.append(float(t))
        return 0.7 * x

    points = solve(flow, noise, SCHEDULE, TINY.steps, euler_steps)
    s = [1 - i / euler_steps for i in range(euler_steps + 1)]
    sigmas = [TINY.shift * v / (1 + (TINY.shift - 1) * v) for v in s]
    assert asked == pytest.approx([1000 * v for v in sigmas[:-1]], rel=1e-5)
    assert points.shape == (2, 5, 1, 1, 2, 2) and torch.equal(points[:, 0], noise)
    for k, step in enumerate([*TINY.steps, 0]):
        at = (1000 - step) * euler_steps // 1000
        factor = math.prod(1 + 0.7 * (sigmas[i + 1] - sigmas[i]) for i in range(at))
        torch.testing.assert_close(points[:, k], factor * noise, rtol=1e-4, atol=1e-5)
        if euler_steps == 1000:
            assert factor == pytest.approx(math.exp(0.7 * (sigmas[at] - 1)), rel=2e-3)
            assert sigmas[at] == pytest.approx(float(SCHEDULE.warp([step])) / 1000 if step else 0)


def test_steps_between_two_levels_lie_on_the_line() -> None:
    """A teacher of another shift, whose levels are not those of the steps."""
    noise, flows = torch.randn(1, 1, 1, 2, 2), []

    def flow(x: Tensor, t: Tensor) -> Tensor:
        flows.append(0.7 * x + 0.1 * t / 1000)
        return flows[-1]

    points = solve(flow, noise, FlowSchedule(5.0), [1000, 750, 500, 250], 7, shift=8.0)[0]
    s = [1 - i / 7 for i in range(8)]
    sigmas = [8 * v / (1 + 7 * v) for v in s]
    x, seen = noise[0], 0
    for (now, then), v in zip(itertools.pairwise(sigmas), flows, strict=True):
        for k, level in enumerate([1.0, 0.9375, 0.833333, 0.625]):
            if now >= level > then:
                torch.testing.assert_close(points[k], x + (level - now) * v[0], atol=1e-4, rtol=0)
                seen += 1
        x = x + (then - now) * v[0]
    assert seen == 4
    torch.testing.assert_close(points[-1], x)
    with pytest.raises(ValueError, match="must fall from at most 1000"):
        solve(flow, noise, SCHEDULE, [500, 750], 7)


def test_trajectories_are_not_made_twice(tmp_path: Path) -> None:
    asked: list[range] = []

    def solved(rows: range) -> tuple[Tensor, Tensor]:
        asked.append(rows)
        points = torch.tensor([*rows]).float().view(-1, 1, 1, 1, 1, 1).expand(-1, 3, 2, 1, 1, 1)
        return points, torch.ones(len(rows), 2 if rows.start else 4, 3)

    count = 2 * IN_FILE + 3
    stored = Trajectories(tmp_path / "t", count)
    progress: list[int] = []
    stored.make(solved, {"teacher": "a"}, ALONE, progress.append)
    parts = [range(IN_FILE), range(IN_FILE, 2 * IN_FILE), range(2 * IN_FILE, count)]
    assert asked == parts and progress == [part.stop for part in parts]
    names = sorted(path.name for path in (tmp_path / "t").iterdir())
    assert len(names) == 4 and not any(name.startswith(".") for name in names)

    Trajectories(tmp_path / "t", count).make(solved, {"teacher": "a"}, ALONE)
    assert asked == parts
    sorted((tmp_path / "t").glob("*.safetensors"))[1].unlink()
    stored.make(solved, {"teacher": "a"}, ALONE)
    assert asked == [*parts, parts[1]]
    with pytest.raises(ValueError, match="t: holds trajectories of other settings: remove them"):
        stored.make(solved, {"teacher": "b"}, ALONE)
    assert len(asked) == 4

    points, text = stored.draw([count - 1, 5, IN_FILE])
    assert points.shape == (3, 3, 2, 1, 1, 1)
    assert points[:, 0, 0].flatten().tolist() == [count - 1, 5, IN_FILE]
    assert text.sum((1, 2)).tolist() == [6, 12, 6] and (text[0, 2:] == 0).all()
    last = sorted((tmp_path / "t").glob("*.safetensors"))[-1]
    last.write_bytes(b"x")
    with pytest.raises(ValueError, match=f"{last.name}: not a whole .*: remove it, and --resume"):
        stored.draw([count - 1])
    for damaged in ("x", "[]"):
        (tmp_path / "t" / "trajectories.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"trajectories.json: is damaged: remove .*/t"):
            stored.make(solved, {"teacher": "a"}, ALONE)


def test_a_run_refuses_trajectories_of_another(make: Make) -> None:
    make("ode", pairs=2)
    make("ode", pairs=2, lr=1.0)  # which makes no difference to them
    for change in ({"guidance_scale": 2.0}, {"teacher_steps": 40}, {"pairs": 3}, {"seed": 1}):
        with pytest.raises(ValueError, match="holds trajectories of other settings"):
            make("ode", **{"pairs": 2, **change})


def test_guidance_leads_away_from_the_negative_prompt() -> None:
    """Constant flows, from σ = 1 to 0 in one step, give noise − flow."""
    noise, asked = torch.randn(2, 1, 4, 8, 8), []

    def against(x: Tensor, t: Tensor) -> Tensor:
        asked.append(float(t))
        return torch.full_like(x, 3.0)

    def x0(guidance: float) -> Tensor:
        flow = lambda x, t: torch.full_like(x, 5.0)  # noqa: E731
        return solve(flow, noise, SCHEDULE, (), 1, unprompted=against, guidance=guidance)[:, -1]

    torch.testing.assert_close(x0(1.0), noise - 5)
    assert not asked
    torch.testing.assert_close(x0(3.0), noise - (3 + 3 * (5 - 3)))
    assert asked == [1000.0]


def test_draws_hang_on_the_row_alone() -> None:
    def draw(*samples: int) -> Draw:
        return Draw(7, range(*samples), torch.device("cpu"))

    whole = draw(0, 4).normal("noise", 3, 2)
    assert torch.equal(whole[2:], draw(2, 4).normal("noise", 3, 2))
    assert len({*whole[:, 0, 0].tolist(), *draw(0, 4).normal("other", 3, 2)[:, 0, 0].tolist()}) == 8
    uniform = draw(0, 500).uniform("u", 8)
    assert 0 <= uniform.min() < 0.01 and 0.99 < uniform.max() < 1
    assert draw(0, 500).normal("n", 8).std() == pytest.approx(1, abs=0.05)
    assert seed_of(1, "a") == seed_of(1, "a") != seed_of(1, "b")


def test_every_update_draws_other_clips(make: Make) -> None:
    run = make("tf")
    seeds = {Batch.draw(run.context, step, name).seed for step in range(9) for name in ("a", "b")}
    assert len(seeds) == 18
    one, other = (load(run, step, 4).clean_BFCHW for step in (0, 1))
    assert not torch.equal(one, other)
