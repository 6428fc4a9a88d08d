"""`sfmodel train --dry-run`: beside arithmetic by hand, and beside what a run holds and writes."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sfmodel.cli import main
from sfmodel.cli.main import run_command
from sfmodel.cli.train import train_command
from sfmodel.config import PRESETS
from sfmodel.cost import GIB, GPUS
from sfmodel.dit import DiT
from sfmodel.ranks import Ranks, sharing
from sfmodel.schedule import FlowSchedule
from sfmodel.train import dry_run as dry
from sfmodel.train.config import RECIPES, TrainConfig
from sfmodel.train.defaults import defaults
from sfmodel.train.dry_run import KEPT, DryRun, dry_run
from sfmodel.train.loop import Run
from sfmodel.train.rollout import Rollout
from sfmodel.training_cost import Update, training_flops, trajectory_flops
from sfmodel.training_memory import lora_parameters, training_gib
from tests.tiny_runs import config, saved, tiny

SMALL, LARGE = 1_418_996_800, 14_288_491_584  # parameters of the public models
LORA = 349_962_240  # of rank 256 on the small one
ALONE = Ranks(0, 1, torch.device("cpu"))
WAN: dict[str, Any] = {"teacher_preset": "wan-14b", "critic": Path("critic.pt")}


@functools.cache
def large() -> DryRun:
    """LongLive's: changes of rank 256 of generator and critic, beside a real score of 14B."""
    lora: dict[str, Any] = {"lora_rank": 256, "lora_critic": True}
    return dry_run(replace(defaults("wan-1.3b", "sf+dmd", "one-node"), **WAN, **lora), 8)


def column(found: DryRun, name: str) -> list[float]:
    return [part.gib[KEPT.index(name)] for part in found.parts]


def test_all_weights_learn() -> None:
    found = dry_run(replace(defaults("wan-1.3b", "sf+dmd", "one-node"), **WAN), 8)
    assert [part[:3] for part in found.parts] == [
        ("generator", SMALL, SMALL), ("real", LARGE, 0), ("critic", SMALL, SMALL),
    ]  # fmt: skip
    eighth = SMALL / 8 / GIB
    for name, want in {
        "weights": [4 * eighth, 2 * LARGE / 8 / GIB, 4 * eighth],
        "gradients": [4 * eighth, 0, 4 * eighth],
        "moments": [8 * eighth, 0, 8 * eighth],
        "average": [4 * eighth, 0, 0],
    }.items():
        assert column(found, name) == pytest.approx(want)
        assert found.gib[name] == pytest.approx(sum(want))
    assert found.gib["total"] == pytest.approx(27.1, abs=0.05)  # docs/training.md
    assert found.gib["total"] == pytest.approx(sum(found.gib.values()) / 2)


def test_changes_learn() -> None:
    found, eighth = large(), LORA / 8 / GIB
    assert [part[:3] for part in found.parts] == [
        ("generator", SMALL + LORA, LORA), ("real", LARGE, 0), ("critic", SMALL + LORA, LORA),
    ]  # fmt: skip
    base = 2 * SMALL / 8 / GIB
    for name, want in {
        "weights": [base + 4 * eighth, 2 * LARGE / 8 / GIB, base + 4 * eighth],
        "gradients": [4 * eighth, 0, 4 * eighth],
        "moments": [8 * eighth, 0, 8 * eighth],
        "average": [4 * eighth, 0, 0],
    }.items():
        assert column(found, name) == pytest.approx(want)
    assert found.written["lora/"] == pytest.approx(4 * LORA / GIB)
    assert found.written["checkpoints/, at most three"] == pytest.approx(
        3 * (4 + 12 + 12) * LORA / GIB
    )
    # In float32 what is changed, all but modulations, norms, embeddings and head.
    assert 4 * SMALL * 0.98 < found.written["model.safetensors"] * GIB < 4 * SMALL
    assert lora_parameters(PRESETS["wan-1.3b"].dit, 256) == LORA


@pytest.mark.parametrize("recipe", ["tf", "df", "ode", "sf+dmd", "tf+sid"])
@pytest.mark.parametrize("rank", [0, 64])
def test_what_is_counted_is_what_the_formula_says(recipe: str, rank: int) -> None:
    """Which knows no model, and counts no discriminator."""
    some: dict[str, Any] = {"lora_rank": rank, "lora_targets": ("ffn.0", "self_attn.o"), "ema": 0.9}
    preset = replace(PRESETS["wan-1.3b"], dit=replace(PRESETS["wan-1.3b"].dit, layers=3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "wan-1.3b", preset)
        found = dry_run(replace(defaults("wan-1.3b", recipe, "one-node"), frames=(21,), **some), 4)
    want = training_gib(preset, recipe, 4, None, 1, rank, lora_targets=some["lora_targets"])
    assert found.gib == pytest.approx(want, rel=1e-3)


@pytest.mark.parametrize(
    ("recipe", "change"),
    [
        ("tf", {"optimizer": "muon"}),
        ("df", {"ema": 0.0, "lora_rank": 4}),
        ("sf+dmd", {"lora_rank": 4}),
        ("sf+gan", {}),
        ("tf+gan", {"lora_rank": 4, "lora_critic": True, "bf16": True, "optimizer": "muon"}),
    ],
)
def test_a_run_holds_and_writes_what_was_said(
    recipe: str, change: dict[str, Any], tmp_path: Path
) -> None:
    with tiny():
        settings = config(tmp_path / "run", recipe, **change)
        found = dry_run(settings)
        assert not found.refused and not settings.output.exists()
        run = Run(settings, ALONE)
        run.train_step()
        kept = saved(run.save())
    models = {name: model for name, model in run.models._asdict().items() if model is not None}
    assert [part.name for part in found.parts] == [*models]

    def gib(tensors: list[Tensor]) -> float:
        return sum(t.numel() * t.element_size() for t in tensors) / GIB

    for part, model in zip(found.parts, models.values(), strict=True):
        parameters = [*model.parameters()]
        grads = [p.grad for p in parameters if p.grad is not None]
        moments = [
            value
            for learner in run.learners.values()
            for optimizer in learner.optimizers
            for p in parameters
            for name, value in optimizer.state.get(p, {}).items()
            if name != "step"
        ]
        averages = [*run.average.values()] if part.name == "generator" and settings.ema else []
        want = [gib(each) for each in (parameters, grads, moments, averages)]
        assert part.gib == pytest.approx(want), part.name
        assert part.parameters == sum(p.numel() for p in parameters)
        assert part.learned == sum(p.numel() for p in parameters if p.requires_grad)
    kept_gib = gib([t for t in kept.values() if isinstance(t, Tensor) and t.dim()])
    assert found.written["checkpoints/, at most three"] == pytest.approx(3 * kept_gib)
    assert found.written["model.safetensors"] * GIB == pytest.approx(
        run.config.weights.stat().st_size, rel=0.2
    )


def test_time_and_clips() -> None:
    """64 clips an update; five updates of the critic before each of the 120 of the generator."""
    found = large()
    assert found.updates == {"generator": 120, "critic": 600}
    assert found.clips == {"generator": 120 * 64, "critic": 600 * 64}
    sizes = PRESETS["wan-1.3b"], PRESETS["wan-14b"].dit
    generator, critic = (
        64
        / 4
        * sum(training_flops(sizes[0], Update("sf+dmd", name, i), sizes[1]) for i in range(4))
        for name in found.updates
    )
    assert found.flops == pytest.approx({"generator": generator, "critic": critic})
    seconds = found.seconds(GPUS["h100"].matmul_tflops, 8)
    rate = 8 * 790e12
    assert seconds == pytest.approx({
        "generator": generator / rate, "critic": critic / rate,
        "run": 120 * (generator + 5 * critic) / rate,
    })  # fmt: skip


def test_time_by_the_length_of_clips_and_the_size_of_chunks() -> None:
    """As many frames in shorter clips, and the mean of two sizes of chunks."""
    settings = TrainConfig("df", frames=(4, 7), chunks=(1, 3), windows=(7,), batch=5)
    toy = PRESETS["toy"]
    of_chunks = [
        training_flops(replace(toy, chunk=chunk), Update("df"), recompute=False) / frames
        for chunk, frames in ((1, 21), (3, 19))
    ]
    found = dry_run(settings)
    assert found.flops == pytest.approx({"generator": 5 * 7 * sum(of_chunks) / 2})
    assert found.clips == {"generator": settings.steps * 8}  # of 4 frames


def test_trajectories_take_time() -> None:
    """The arithmetic of ODE regression: DF and TF by turns, and 48 guided steps of the teacher
    before, which are counted as PyTorch does."""
    settings = replace(defaults("wan-1.3b", "ode", "one-node"), batch=64)
    found = dry_run(settings, 8)
    assert found.updates == {"generator": 3000, "trajectory": 1500} and found.clips == {
        "generator": 3000 * 64, "trajectory": 1500,
    }  # fmt: skip
    wan = PRESETS["wan-1.3b"]
    by_turns = (training_flops(wan, Update(recipe)) for recipe in ("df", "tf"))
    assert found.flops["generator"] == pytest.approx(64 * sum(by_turns) / 2)
    assert found.flops["trajectory"] == trajectory_flops(wan, wan.dit, 48)
    only = dry_run(replace(settings, recipe="df+ode"), 8).flops["generator"]
    assert only == pytest.approx(64 * training_flops(wan, Update("df")))
    each = found.seconds(1.0, 8)
    assert each["run"] == pytest.approx(3000 * each["generator"] + 1500 * each["trajectory"])


def test_the_largest_clips_and_chunks_count() -> None:
    """Elements kept of a token, by hand: a block's, and where it is recomputed two rows of 1536 of
    each block and one whole one."""
    d, ffn = 1536, 8960
    block, clip = 18.375 * d + 2 * ffn + 2 * 12 + 10, 21 * 1560
    whole = 30 * 2 * d + block

    def peak(recipe: str, **change: Any) -> tuple[float, float]:
        settings = replace(defaults("wan-1.3b", recipe, "one-node"), **change)
        gib = dry._largest(settings, 64, 64)
        return gib["activations"] * GIB / 2, gib["cache"] * GIB / 2

    cache = 2 * 30 * clip * d
    by_chunk = 3 * 1560 * 30 * block, cache
    assert peak("sf+dmd", chunks=(1, 3)) == pytest.approx(by_chunk)
    assert peak("sf+dmd", chunks=(1,)) == pytest.approx((by_chunk[0] / 3, cache))
    assert peak("sf+dmd", chunks=(3,), micro_batch=0, batch=128) == pytest.approx(
        (2 * by_chunk[0], 2 * cache)
    )
    # SiD keeps passes of both scores; a critic that recomputes nothing keeps all of its own.
    assert peak("sf+sid") == pytest.approx((2 * clip * whole, cache))
    assert peak("sf+dmd", recompute=False) == pytest.approx((clip * 30 * block, 0))
    assert peak("tf") == pytest.approx((2 * clip * whole, 0))
    assert peak("df", frames=(3, 21)) == pytest.approx((clip * whole, 0))
    assert peak("df+dmd") == pytest.approx((clip * whole, 0))
    assert peak("df+sid") == pytest.approx((3 * clip * whole, 0))
    assert peak("bidirectional", lora_rank=4) == pytest.approx((clip * (whole + 4 * 8), 0))


def test_longer_rollouts_take_a_window_more_and_have_no_floor_of_time() -> None:
    long = replace(defaults("toy", "sf+dmd"), frames=(7,), windows=(7,), rollouts=(7, 28))
    clip = dry._largest(replace(long, rollouts=()), 1, 1)["cache"] / 7
    assert dry._largest(long, 1, 1)["cache"] == pytest.approx(14 * clip)
    assert dry._largest(replace(long, rollouts=(10,)), 1, 1)["cache"] == pytest.approx(10 * clip)
    assert dry_run(long).flops == {} and dry_run(replace(long, rollouts=(7,))).flops
    model, steps = DiT(PRESETS["toy"].dit), PRESETS["toy"].steps
    for chunk in (1, 3):  # what the ring of a rollout holds
        layout = long.layout(28, chunk, 7)
        noise, text = lambda frames, i: torch.zeros(()), torch.zeros(())
        exits = (0,) * len(layout.chunks)
        schedule = FlowSchedule(long.model.shift)
        made = Rollout(model, layout, schedule, steps, exits, noise, text, frames=7)
        assert made.capacity <= 28
        part = replace(made, gradient_frames=7 - layout.chunks[0])
        assert 7 <= part.capacity <= 14


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe(recipe: str) -> None:
    found = dry_run(replace(defaults("toy", recipe), optimizer="adamw"), 1)
    assert found.gib["total"] > 0 and not found.refused
    assert ("trajectories/" in found.written) == (recipe in ("ode", "df+ode"))
    assert bool(found.flops) == (recipe in dry.COUNTED)


def said(words: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    given = ["--dry-run", *words.split()]
    code: Any = 0
    try:
        run_command("sfmodel", {"train": train_command(given)}, ["train", *given])
    except SystemExit as stopped:
        code = stopped.code
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of 14B in the time and the memory of a test; what is not there is named, once each."""
    monkeypatch.chdir(tmp_path)
    words = "--preset wan-14b --recipe sf+dmd --ranks 8 --output run"
    code, out, err = said(words, capsys)
    assert code == 0 and not err and not [*tmp_path.iterdir()]
    assert "predicted, not measured" in out and "\x1b" not in out
    assert "14,288.5" in out and "131" in out
    fits = [line.split("│")[3].strip() for line in out.splitlines() if "SXM" in line]
    assert fits == ["no", "yes"]
    missing = [line for line in out.splitlines() if line.startswith("missing or refused")]
    assert len(missing) == 4 and "ode_init.pt" in missing[0]
    assert "data: no such file or folder: must be" in missing[2]
    assert "there is no text encoder for it" in missing[3]


@pytest.mark.parametrize(
    ("words", "said_of_it"),
    [
        ("--ranks 0", "ranks=0: goes with a dry run, and must be at least 1"),
        ("--ranks 2", "optimizer='muon' runs on one rank"),
        ("--optimizer adamw --ranks 3", "an update of 512 clips: must divide into 3 ranks"),
        ("--micro-batch 5", "must divide into 1 ranks and micro_batch=5"),
        ("--optimizer adamw --ranks 4 --shard 3", "shard=3: must divide the 4 ranks"),
    ],
)
def test_what_is_refused(words: str, said_of_it: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = said(words, capsys)
    assert code == 2 and said_of_it in err


def test_ranks_go_with_a_dry_run(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_command("sfmodel", {"train": train_command([])}, ["train", "--ranks", "2"])
    assert "ranks=2: goes with a dry run" in capsys.readouterr().err


@pytest.fixture(autouse=True)
def _no_ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    yield


def test_ones_own_sizes_are_those_of_the_public_models() -> None:
    for preset, want in (("wan-1.3b", SMALL), ("wan-14b", LARGE)):
        with torch.device("meta"):
            assert sum(p.numel() for p in DiT(PRESETS[preset].dit).parameters()) == want


def test_a_copy_is_shared_by_no_more_ranks_than_there_are() -> None:
    assert [sharing(8, world) for world in (1, 2, 8, 64)] == [1, 2, 8, 8]
    assert [sharing(0, world) for world in (1, 4)] == [1, 4]
    with pytest.raises(ValueError, match="shard=8: must divide the 12 ranks"):
        sharing(8, 12)


@pytest.mark.parametrize(
    ("words", "said", "others"),
    [
        ("--preset wan-1.3b", ("14,288.5", "wan-1.3b, GPUs: 8"), ("stage teacher",)),
        ("--preset wan-1.3b --variant one-node", ("wan-1.3b, GPUs: 8",), ("14,288.5",)),
        (
            "--optimizer adamw --teacher mine.safetensors",
            ("mine.safetensors: there is no",),
            ("stage teacher",),
        ),
        ("--optimizer adamw", ("stage teacher: bidirectional, toy",), ("missing or refused",)),
    ],
)
def test_a_dry_run_of_all_stages(
    words: str, said: tuple[str, ...], others: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """As the command line reads it: stages, their defaults and what earlier ones make."""
    command = f"train --pipeline self-forcing --dry-run --ranks 8 --batch 64 {words}"
    monkeypatch.setattr(sys, "argv", ["sfmodel", *command.split()])
    main.main()
    out = capsys.readouterr().out
    assert "stage init: ode" in out and "stage self-forcing: sf+dmd" in out
    assert all(each in out for each in said) and not any(each in out for each in others)
    assert "2-init/model.safetensors" not in out  # which the stage before makes
