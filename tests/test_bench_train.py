"""Training iterations: who is right is timed, who is not is said; the table beside Figure 6."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import sfkernels as sf
from bench import harness, timing, train
from bench.train import attend_by, batch_of, check, iteration, new_run, results
from sfkernels import BlockLayout
from sfkernels.dispatch import IMPLS
from sfmodel.blocks import SelfAttention
from sfmodel.config import PRESETS
from sfmodel.cost import training_flops
from sfmodel.dit import DiT
from sfmodel.train.loop import Run
from sfmodel.train.objectives.flow import diffusion_forcing_loss

TOY = PRESETS["toy"]
SMALL = replace(TOY, dit=replace(TOY.dit, dim=64, heads=1, ffn_dim=64, layers=2))
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "toy", SMALL)


def trainer(recipe: str = "tf", bf16: bool = False) -> Run:
    return new_run(recipe, "toy", CPU, bf16)


def models(run: Run) -> dict[str, DiT]:
    return {name: m for name, m in run.models._asdict().items() if m is not None}


def test_diffusion_forcing_is_the_weighted_flow_error_of_noisy_chunks() -> None:
    torch.manual_seed(0)
    model = DiT(SMALL.dit).double()
    torch.nn.init.normal_(model.head.head.weight, std=0.1)
    clean, noise = torch.randn(2, 2, 4, 4, 8, 8, dtype=torch.float64)
    sigma = torch.tensor([[0.1, 0.1, 0.9, 0.9], [0.3, 0.3, 1.0, 1.0]], dtype=torch.float64)
    text = torch.randn(2, 3, 32, dtype=torch.float64)
    layout = BlockLayout.causal(4, 2, 4)
    weight = (sigma / 0.3).clamp(max=1).square()
    loss = diffusion_forcing_loss(model, clean, noise, sigma, text, layout, weight)
    s = sigma[:, :, None, None, None]
    x = (1 - s) * clean + s * noise
    x0 = x - s * model(x, sigma * 1000, text, layout=layout)  # its error counts as 1 / max(σ, 0.3)²
    want = ((x0 - clean) / s.clamp(min=0.3)).square().mean()
    torch.testing.assert_close(loss, want, rtol=1e-6, atol=1e-6)


def test_an_iteration_moves_the_weights_and_leaves_no_gradient() -> None:
    run = trainer()
    model = run.models.generator
    before = [p.detach().clone() for p in model.parameters()]
    whole, phases = iteration(run, "TF")
    assert [*phases] == ["forward", "backward", "optimiser"]
    assert 0.5 * whole < sum(phases.values()) < whole
    moved = [not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True)]
    assert all(moved) and model.recompute  # recomputed blocks too
    assert all(p.grad is None for p in model.parameters())
    tokens = batch_of(run, "TF").layout.tokens
    assert tokens == 2 * batch_of(trainer("df"), "DF").layout.tokens == 2 * 19 * 4


@pytest.mark.skipif("flex" not in IMPLS, reason="FlexAttention is no implementation here")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("row", [*train.IN_FULL])
def test_flex_attention_sees_what_the_layout_shows(
    row: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward only: PyTorch has no backward pass of it on a CPU."""
    run = trainer(row.lower())
    batch = batch_of(run, row).load(range(1))

    def loss(impl: str) -> torch.Tensor:
        attend_by(run, impl)
        with torch.no_grad():
            return run.objective.generator_loss(batch)

    want, got = loss("reference"), loss("flex")
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)
    monkeypatch.setattr(sf, "block_causal_attention", unmasked("flex"))
    assert abs(loss("flex") - want) > 1e-4 * want


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter")
def test_our_kernels_agree_in_mixed_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 weights under autocast, blocks recomputed, all ops by Triton. In float16: the
    interpreter's matrix products of bfloat16 are wrong."""
    small = replace(SMALL, chunk=1, dit=replace(SMALL.dit, layers=1))
    monkeypatch.setitem(PRESETS, "toy", small)
    monkeypatch.setattr(train, "clip_chunks", lambda _: (1, 1))
    monkeypatch.setattr(Run, "autocast", lambda _: torch.autocast("cpu", torch.float16))
    run = trainer(bf16=True)
    attend_by(run, "sdpa")
    want = results(run, "TF")
    for module in run.models.generator.modules():
        if hasattr(module, "impl"):
            module.impl = "triton"  # type: ignore[assignment]
    attend_by(run, "triton")
    got = results(run, "TF")
    assert any(not torch.equal(got[name], want[name]) for name in want)  # other kernels
    check(got, want, half=True)


def unmasked(wrong: str) -> Callable[..., torch.Tensor]:
    """The op, which under the implementation `wrong` shows everything to all."""
    right = sf.block_causal_attention

    def attend(q: Any, k: Any, v: Any, layout: BlockLayout, *, impl: str, **_: Any) -> Any:
        seen = BlockLayout((layout.tokens,), 1) if impl == wrong else layout
        return right(q, k, v, seen, impl=impl)

    return attend


def test_a_wrong_contestant_is_said_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sf, "block_causal_attention", unmasked("sdpa"))
    result = train.run(harness.Job(CPU, tiny=True, rounds=1, only="DF"))
    entries = result["rows"][0]["contestants"]
    assert entries["sdpa"]["failed"].startswith(timing.WRONG) and "ms" in entries["reference"]
    assert harness.wrong(result, of_peers=True) == ["DF: sdpa"] and not harness.wrong(result)
    assert timing.WRONG in str(train.tables(result)[0].rows)


def test_one_that_fails_leaves_the_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Also while it is timed, and the one that all are compared with."""

    def fails_second(run: Run, row: str) -> Any:
        block: Any = run.models.generator.blocks[0]
        if block.self_attn.attention_impl == "sdpa":
            raise torch.OutOfMemoryError("no memory")
        return iteration(run, row)

    monkeypatch.setattr(train, "iteration", fails_second)
    result = train.run(harness.Job(CPU, tiny=True, rounds=2, only="TF"))
    assert result["rows"][0]["contestants"]["sdpa"] == {"failed": "OutOfMemoryError: no memory"}
    assert result["rows"][0]["contestants"]["reference"]["ms"] > 0

    monkeypatch.setattr(train, "TINY_IMPLS", ("gluon", "sdpa"))
    result = train.run(harness.Job(CPU, tiny=True, rounds=1, only="TF|SF-1"))
    assert [row["failed"][:10] for row in result["rows"]] == ["ValueError"] * 3
    assert len(train.tables(result)[0].rows) == 3
    assert harness.draw(train, result, tmp_path).startswith("no figures")


def test_rows_tables_and_figure(tmp_path: Path) -> None:
    saved: list[str] = []
    job = harness.Job(CPU, tiny=True, rounds=2, save=lambda r: saved.append(json.dumps(r)))
    result = train.run(job)
    assert saved[-1] == json.dumps(result) and len(saved) > 4  # after every round
    flops = training_flops(SMALL)
    assert [row["case"] for row in result["rows"]] == [*train.ROWS]
    for row in result["rows"]:
        want = train.flops(SMALL, row["case"])
        assert row["flops"] == want and row["rounds"] == 2
        for entry in row["contestants"].values():
            assert entry["tflops"] == pytest.approx(want / entry["ms"] / 1e9)
            phases = [phase["ms"] for phase in entry["phases"].values()]
            assert len(phases) >= 3 and 0 < max(phases) < entry["p99_ms"]
    assert train.flops(SMALL, "TF") == flops["teacher forcing"]
    mean = sum(train.flops(SMALL, f"SF-{n}") for n in (1, 2, 3, 4)) / 4
    assert mean == pytest.approx(flops["self forcing, generator"])  # of exit steps drawn at random
    mean = sum(train.flops(SMALL, f"SF-{n} critic") for n in (1, 2, 3, 4)) / 4
    assert mean == pytest.approx(flops["self forcing, critic"])
    ours, published = train.tables(result)
    assert len(ours.rows) == 2 * len(train.ROWS)
    assert [row[0] for row in published.rows] == ["DF", "TF", "SF-1", "SF-2", "SF-3", "SF-4"]
    assert sum("no critic here" in row for row in published.rows) == 2
    assert all(len(row) == len(t.columns) for t in (ours, published) for row in t.rows)
    assert harness.draw(train, result, tmp_path) == "figures: train.png"

    late = train.run(harness.Job(CPU, tiny=True, rounds=1, seconds=0))
    assert not late["rows"] and late["no_time_for"] == [*train.ROWS]
    assert "not run" in str(train.tables(late)[1].rows)


def test_flex_attention_comes_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """It compiles for minutes, so that its rows are measured once more, when all are."""
    measured: list[tuple[str, bool]] = []
    monkeypatch.setattr(train, "new_run", lambda recipe, *_, **__: trainer(recipe))
    monkeypatch.setattr(
        train, "measure", lambda run, row, *rest: measured.append((row["case"], "flex" in rest[2]))
    )
    result = train.run(harness.Job(CPU, rounds=1, only="^(TF|DF|SF-1)$"))
    assert measured == [(n, False) for n in ("TF", "DF", "SF-1")] + [("TF", True), ("DF", True)]
    assert [row["case"] for row in result["rows"]] == ["TF", "DF", "SF-1"]
    left = iter([1.0, 1.0, 1.0, -1.0, -1.0])
    monkeypatch.setattr(harness.Job, "left", property(lambda _: next(left)))
    result = train.run(harness.Job(CPU, rounds=1, only="^(TF|DF|SF-1)$"))
    assert result["no_time_for"] == ["TF with flex", "DF with flex"]


@pytest.mark.parametrize("row", ["SF-2", "SF-2 critic"])
def test_self_forcing_trains_the_generator_or_the_critic(row: str) -> None:
    """All weights of the one that learns move, none of the others."""
    run = trainer("sf+dmd")
    assert batch_of(run, row).exit_step == 1
    before = {name: [p.detach().clone() for p in m.parameters()] for name, m in models(run).items()}
    assert len(before) == 3
    _, phases = iteration(run, row)
    learner = train.learner_of(row)
    judged = "forward" if learner == "critic" else "score"
    assert [*phases] == ["rollout", judged, "backward", "optimiser"]
    for name, model in models(run).items():
        pairs = zip(model.parameters(), before[name], strict=True)
        moved = {not torch.equal(now, then) for now, then in pairs}
        assert moved == {name == learner}, name
        assert all(p.grad is None for p in model.parameters())


def test_every_model_attends_by_the_same_implementation() -> None:
    run = trainer("sf+dmd")
    attend_by(run, "reference")
    found = {m.attention_impl for model in models(run).values() for m in model.modules()
             if isinstance(m, SelfAttention)}  # fmt: skip
    assert len(models(run)) == 3 and found == {"reference"}


def test_time_is_spent_in_the_order_of_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "iteration", lambda *_: (2.0, {"forward": 1.0, "backward": 1.0}))
    slow = iter(range(0, 10**6, 16))
    monkeypatch.setattr(harness.Job, "left", property(lambda _: 50.0 - next(slow)))
    result = train.run(harness.Job(CPU, tiny=True, only="^(TF|DF|SF-1)$"))
    assert [row["rounds"] for row in result["rows"]] == [3, 1]
    assert result["no_time_for"] == ["SF-1"]
