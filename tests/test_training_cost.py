"""The arithmetic of training: what PyTorch counts in the trainer's own updates, a hand count for
Wan2.1-1.3B at 480×832, and Figure 6 (arXiv 2506.08009)."""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.train import batch_of, new_run
from sfkernels import BlockLayout
from sfmodel.cli.predict import prediction
from sfmodel.config import PRESETS
from sfmodel.dit import DiT
from sfmodel.schedule import FlowSchedule
from sfmodel.train.loop import Run
from sfmodel.train.trajectories import solve
from sfmodel.training_cost import (
    Update,
    figure6,
    floor_seconds,
    to_first,
    training_flops,
    trajectory_flops,
)
from tests.test_cost import H100, H200, WAN, D, N, agrees

TOY = PRESETS["toy"]
SMALL = replace(TOY, chunk=8, dit=replace(TOY.dit, dim=64, heads=1, ffn_dim=96, layers=3))
CHUNKS = 1, 8, 8  # latent frames of a clip; a frame has 4 tokens
LARGE = replace(SMALL.dit, dim=128, heads=2, layers=2)


def sdpa_flops(q: Any, k: Any, *_: Any, products: int, **__: Any) -> int:
    batch, heads, queries, channels = q
    return 2 * products * batch * heads * queries * k[2] * channels


def forward(q: Any, k: Any, *_: Any, **__: Any) -> int:
    return sdpa_flops(q, k, products=2)


def backward(_: Any, q: Any, k: Any, *__: Any, **___: Any) -> int:
    return sdpa_flops(q, k, products=5)


SDPA: Any = {  # which FlopCounterMode knows on a GPU alone
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: forward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
}


def counted(run: Run, update: Update) -> float:
    """FLOPs of `Run.update` by PyTorch's own count of every matrix product."""
    with FlopCounterMode(display=False, custom_mapping=SDPA) as counter:
        run.update(update.learner, batch_of(run, update))
    return counter.get_total_flops()


def past_gradient(update: Update) -> float:
    """FLOPs of the two products that SDPA adds in the backward pass of a self rollout, the
    gradients of keys and values of the past, which nobody uses."""
    if update.recipe != "sf+dmd" or update.learner == "critic":
        return 0
    past = sum(4 * size * 4 * sum(CHUNKS[:i]) for i, size in enumerate(CHUNKS))
    return 2 * 2 * past * SMALL.dit.dim * SMALL.dit.layers


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("recipe", ["tf", "df", "tf+dmd", "df+dmd", "sf+dmd"])
def test_the_trainer_does_what_is_predicted(
    recipe: str, recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last FLOP."""
    monkeypatch.setitem(PRESETS, "toy", SMALL)
    run = new_run(recipe, "toy", torch.device("cpu"), bf16=False)
    assert any(model.recompute for model in run.models if isinstance(model, DiT))
    for model in run.models:
        if isinstance(model, DiT) and not recompute:
            model.recompute = False
    steps = (0, 3) if recipe == "sf+dmd" else (0,)
    for learner, exit_step in itertools.product(run.learners, steps):
        update = Update(recipe, learner, exit_step)
        want = training_flops(SMALL, update, recompute=recompute)
        assert counted(run, update) == want + past_gradient(update), update


def test_a_real_score_of_another_size_and_without_guidance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "toy", SMALL)
    run = new_run("df+dmd", "toy", torch.device("cpu"), bf16=False)
    update, plain = Update("df+dmd"), replace(run.config, guidance_scale=1.0)
    assert run.config.guidance_scale != 1
    run.context = run.context._replace(models=run.models._replace(real=DiT(LARGE)))
    assert counted(run, update) == training_flops(SMALL, update, LARGE)
    run.context = run.context._replace(config=plain)
    assert counted(run, update) == training_flops(SMALL, update, LARGE, guided=False)


def test_a_trajectory() -> None:
    teacher, frames = DiT(LARGE), sum(CHUNKS)
    noise, text = torch.randn(1, frames, 4, 8, 8), torch.randn(1, LARGE.text_len, LARGE.text_dim)
    schedule, flow = FlowSchedule(SMALL.shift), functools.partial(teacher, text_BTE=text)
    with FlopCounterMode(display=False, custom_mapping=SDPA) as counter, torch.no_grad():
        solve(flow, noise, schedule, (), 3)
    assert counter.get_total_flops() == trajectory_flops(SMALL, LARGE, 3, guided=False)
    assert trajectory_flops(SMALL, LARGE, 3) == 2 * trajectory_flops(SMALL, LARGE, 3, guided=False)


def test_by_hand() -> None:
    """Linears of a pass 81.9 TFLOP, block-causal attention 113, cross-attention 3.1, a thousandth
    of it the prompt's keys; dense teacher forcing would take 791 in attention."""
    tokens, layout = 21 * N, BlockLayout.causal(21, 3, N)
    linears = 2 * tokens * (30 * (6 * D * D + 2 * D * 8960) + 2 * D * 64)
    attended, crossed = 30 * 4 * D * layout.pairs, 30 * 4 * D * tokens * 512
    for each, said in zip((linears, attended, crossed), ("81.9", "113", "3.1"), strict=True):
        assert agrees(each / 1e12, said)
    twice = BlockLayout.causal(21, 3, N, teacher_forcing=True)
    assert agrees(30 * 4 * D * twice.tokens**2 / 1e12, "791")

    causal = linears + attended + crossed
    full = linears + 30 * 4 * D * tokens**2 + crossed
    forcing = 4 * linears + 4.5 * (attended + crossed)
    critic = 4 * linears + 4.5 * (full - linears)
    scores = 3 * full
    # Six of seven chunks go into the cache, without the last layer but for q, k and v.
    before = BlockLayout.causal(18, 3, N)
    last = 2 * 18 * N * (3 * D * D + 2 * D * 8960 + D * 64)
    cache = 6 / 7 * linears - last + 29 * 4 * D * (before.pairs + 18 * N * 512)
    past = 30 * 4 * D * (layout.pairs - 7 * (3 * N) ** 2)
    again = 3 * linears + 3.5 * (attended + crossed) - past
    for update, want in (
        (Update("df"), forcing),
        (Update("tf"), 2 * forcing),
        (Update("df+dmd"), forcing + scores),
        (Update("tf+dmd"), 2 * forcing + scores),
        (Update("sf+dmd"), causal + cache + again + scores),
        (Update("sf+dmd", exit_step=3), 4 * causal + cache + again + scores),
        (Update("df+dmd", "critic"), causal + critic),
        (Update("tf+dmd", "critic"), 2 * causal + critic),
        (Update("sf+dmd", "critic", 2), 3 * causal + cache + critic),
    ):
        assert training_flops(WAN, update) == pytest.approx(want, rel=2e-3), update


TABLE = {  # TFLOP with a real score of 1.3B and of 14B
    "DF + DMD": ("1700", "4491"),
    "TF + DMD": ("2550", "5341"),
    "SF-1 + DMD": ("1768", "4559"),
    "SF-4 + DMD": ("2362", "5153"),
    "TF + DMD critic": ("1629", "1629"),
    "SF-4 + DMD critic": ("2178", "2178"),
}


@pytest.mark.parametrize("gpu", [H100, H200])
def test_figure_6(gpu: Any) -> None:
    """An H100 has an H200's rate."""
    named = figure6(4)
    assert len(named) == 12 and [*named][-1] == "SF-4 + DMD critic"
    for name, said in TABLE.items():
        for score, one in zip(("wan-1.3b", "wan-14b"), said, strict=True):
            flops = training_flops(WAN, named[name], PRESETS[score].dit)
            assert agrees(flops / 1e12, one), name
            assert floor_seconds(flops, gpu) == pytest.approx(flops / 790e12)
    rows = prediction(WAN, gpu)["training"]
    assert len(rows) == 2 + 6 + 6 + 6
    by_name = {(row["update"], row["real_score"]): row for row in rows}
    for name, (small, large) in TABLE.items():
        scores = [("", small)] if "critic" in name else [("wan-1.3b", small), ("wan-14b", large)]
        for score, tflop in scores:
            assert agrees(by_name[name, score]["tflop"], tflop)
    assert by_name["TF + DMD", "wan-14b"]["to_sf1"] == pytest.approx(5341 / 4559, rel=1e-3)
    assert by_name["SF-1 + DMD critic", ""]["to_sf1"] == 1
    assert by_name["TF, flow matching", ""]["to_sf1"] is None
    assert len(prediction(replace(WAN, steps=(1000,)), gpu)["training"]) == 2 + 3 + 3 + 3


def test_ratios_are_to_the_same_learner() -> None:
    figures = {"TF + DMD": 3.0, "SF-1 + DMD": 2.0, "SF-2 + DMD critic": 1.0}
    assert to_first(figures) == {"TF + DMD": 1.5, "SF-1 + DMD": 1.0}
