"""LoRA in training: what it computes, its files in PEFT and here, and exact resume."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from sfkernels import BlockLayout
from sfmodel.cli.main import run_command
from sfmodel.cli.train import train_command
from sfmodel.config import DiTConfig
from sfmodel.dit import DiT
from sfmodel.pretrained import load_model
from sfmodel.ranks import Ranks
from sfmodel.train.config import RECIPES
from sfmodel.train.loop import Run, train
from sfmodel.train.lora import Adapter, LoraLinear
from sfmodel.weights import checkpoint, names
from sfmodel.weights.lora import Lora, merge, read_lora
from tests.public_wan import DIM, GRID, HEADS, WholeModel
from tests.tiny_runs import TINY, config, draw_pictures, logged, saved, tiny

CONFIG = DiTConfig(
    DIM, 2 * DIM, HEADS, 2, channels=4, freq_dim=8, text_dim=8, text_len=4, prediction="flow"
)  # fmt: skip
ADAPTER = Adapter(rank=3, alpha=4.5)
ALONE = Ranks(0, 1, torch.device("cpu"))
# Where public layers are that are parts of one here: its name, which part, of how many.
OURS = {f"self_attn.{name}": ("self_attn.qkv", i, 3) for i, name in enumerate("qkv")}
OURS |= {f"cross_attn.{name}": ("cross_attn.kv", i, 2) for i, name in enumerate("kv")}
LORA: dict[str, Any] = {"lora_rank": 2, "lora_alpha": 3.0}


@pytest.fixture(autouse=True)
def _tiny() -> Iterator[None]:
    with tiny():
        yield


@pytest.fixture
def model() -> DiT:
    """Of random weights, with random changes."""
    torch.manual_seed(0)
    made = DiT(CONFIG)
    for parameter in ADAPTER.add(made).parameters():
        nn.init.normal_(parameter, std=0.1)
    return made


def plain(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights without the changes."""
    return {name: value for name, value in state.items() if "lora_" not in name}


def pair(state: dict[str, Tensor], block: int, layer: str) -> tuple[Tensor, Tensor]:
    """A and B of a layer by its public name, from the rows of ours."""
    own, at, parts = OURS.get(layer, (layer, 0, 1))
    a, b = (state[f"blocks.{block}.{own}.lora_{which}"] for which in "AB")
    return a.chunk(parts)[at], b.chunk(parts)[at]


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(2, 2, 4, 2 * GRID[0], 2 * GRID[1])
    return x, torch.tensor([[700.0, 500.0], [300.0, 900.0]]), torch.randn(2, 4, 8)


@pytest.mark.parametrize("causal", [False, True])
def test_running_is_merging_and_so_are_its_gradients(
    model: DiT, tmp_path: Path, causal: bool
) -> None:
    """Of A and B, from those of the merged weights W + s·B·A: s·Bᵀ·dW and s·dW·Aᵀ."""
    layout = BlockLayout((1, 1), GRID[0] * GRID[1]) if causal else None
    merged, given = DiT(CONFIG), inputs()
    merged.load_state_dict(plain(model.state_dict()))
    ADAPTER.save(tmp_path, {k: v for k, v in model.state_dict().items() if "lora_" in k})
    wanted = checkpoint.to_official(merged.state_dict())
    merge(merged, read_lora(Lora(tmp_path), wanted))
    ours, theirs = (each(*given, layout=layout) for each in (model, merged))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    for name, value in ADAPTER.merged(model.state_dict()).items():
        torch.testing.assert_close(value, merged.state_dict()[name])

    for out in (ours, theirs):
        out.square().sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert all("lora_" in name for name in found) and len(found) == 2 * 2 * 7
    of_merged: dict[str, Tensor] = {n: p.grad for n, p in merged.named_parameters()}  # type: ignore[misc]
    dense = checkpoint.to_official(of_merged)
    for i, layer in ((i, layer) for i in range(2) for layer in names.LINEARS):
        a, b = pair(model.state_dict(), i, layer)
        of_weight = dense[f"blocks.{i}.{layer}.weight"]
        want = 1.5 * b.T @ of_weight, 1.5 * of_weight @ a.T
        for ours, theirs in zip(pair(found, i, layer), want, strict=True):
            assert (ours - theirs).norm() < 1e-4 * theirs.norm(), layer


def test_peft_loads_it_onto_the_public_model(model: DiT, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    ADAPTER.save(tmp_path, {k: v for k, v in model.state_dict().items() if "lora_" in k})
    public = WholeModel(
        patch_size=CONFIG.patch, in_dim=4, dim=DIM, freq_dim=8, text_dim=8, num_layers=2
    )
    official = checkpoint.to_official(plain(model.state_dict()))
    public.load_state_dict({name: official[name] for name in public.state_dict()})
    x, t, text = inputs()
    with torch.no_grad():
        alone = public(x.transpose(1, 2), t, text, 1000)
        changed = peft.PeftModel.from_pretrained(public, tmp_path)
        got = changed(x.transpose(1, 2), t, text, 1000).transpose(1, 2)
        want = model(x, t, text)
    assert not [name for name, p in changed.named_parameters() if "lora" in name and not p.any()]
    assert (got - want).norm() < 1e-4 * want.norm()
    assert (alone.transpose(1, 2) - want).norm() > 0.05 * want.norm()


def test_diffusers_loads_it(model: DiT, tmp_path: Path) -> None:
    """Under the prefix of its name for files of the official model, and at alpha = rank."""
    diffusers = pytest.importorskip("diffusers")
    mixin = pytest.importorskip("diffusers.loaders").WanLoraLoaderMixin
    adapter = ADAPTER._replace(alpha=3.0)
    for module in model.modules():
        if isinstance(module, LoraLinear):
            module.scale = adapter.scale
    adapter.save(tmp_path, {k: v for k, v in model.state_dict().items() if "lora_" in k})
    theirs = diffusers.WanTransformer3DModel(
        num_attention_heads=HEADS, attention_head_dim=DIM // HEADS, in_channels=4, out_channels=4,
        text_dim=8, freq_dim=8, ffn_dim=2 * DIM, num_layers=2,
    ).eval()  # fmt: skip
    official = checkpoint.to_official(plain(model.state_dict()))
    theirs.load_state_dict(names.diffusers(official))
    file = load_file(tmp_path / "adapter_model.safetensors")
    named = {k.replace("base_model.model", "diffusion_model"): v for k, v in file.items()}
    theirs.load_lora_adapter(mixin.lora_state_dict(named), prefix="transformer")
    x, _, text = inputs()
    t = torch.tensor([700.0, 300.0])
    with torch.no_grad():
        got = theirs(x.transpose(1, 2), t, text, return_dict=False)[0].transpose(1, 2)
        want = model(x, t, text)
    assert (got - want).norm() < 1e-4 * want.norm()


def test_the_published_size() -> None:
    """LongLive's of rank 256, by hand: eight pairs of 1536 and 1536, two of 1536 and 8960, in each
    of 30 blocks."""
    with torch.device("meta"):
        made = Adapter(256, 256.0).add(DiT(DiTConfig(1536, 8960, 12, 30)))
    count = sum(p.numel() for p in made.parameters() if p.requires_grad)
    assert count == 30 * 256 * (8 * 2 * 1536 + 2 * (1536 + 8960)) == 349_962_240


@pytest.mark.parametrize(
    ("recipe", "change"),
    [("tf", {}), ("df", {"bf16": True}), ("ode", {"lora_targets": ("ffn.0",)}),
     ("sf+dmd", {}), ("sf+dmd", {"lora_critic": True, "lora_targets": ("ffn.2", "self_attn.o")}),
     ("sf+gan", {"lora_critic": True, "optimizer": "muon"})],
)  # fmt: skip
def test_what_learns_and_what_is_written(
    recipe: str, change: dict[str, Any], tmp_path: Path
) -> None:
    settings = config(tmp_path / "run", recipe, **LORA, **change)
    train(settings, device="cpu")
    kept = saved(tmp_path / "run" / "checkpoints" / "step-000004")
    learned = {name for name in kept if "/weights/" in name or "/state/" in name}
    of_critic = {name for name in learned if name.startswith("/critic")}
    assert all("lora_" in name for name in learned - of_critic) and learned > of_critic
    all_of_it = {name for name in of_critic if "lora_" not in name and "discriminator" not in name}
    assert bool(all_of_it) == (RECIPES[recipe].needs_critic and not settings.lora_critic)
    averages = {k.removeprefix("/average/"): v for k, v in kept.items() if "/average/" in k}
    assert averages and all("lora_" in name for name in averages)
    assert any(value.any() for name, value in averages.items() if "lora_B" in name)

    # The whole weights are the file that it started from, with what was learned merged into them.
    state, metadata = checkpoint.read(tmp_path / "run" / "model.safetensors")
    base = DiT(TINY.dit)
    checkpoint.load(base, tmp_path / "init.safetensors")
    if settings.bf16:
        base = base.bfloat16().float()
    found = Lora(tmp_path / "run" / "lora")
    changes = read_lora(found, checkpoint.to_official(base.state_dict()))
    assert {1.5} == {each.scale for each in changes.values()}
    assert {name.split("blocks.0.")[1] for name in changes} == {
        f"{name}.weight" for name in names.targeted(settings.lora_targets)
    }
    merge(base, changes)
    for name, value in checkpoint.to_official(base.state_dict()).items():
        torch.testing.assert_close(state[name].float(), value, msg=name)
    assert json.loads(metadata["step"]) == 4
    for name, value in checkpoint.to_official(averages).items():
        file = load_file(found.path / "adapter_model.safetensors")
        assert torch.equal(file[f"base_model.model.{name}.weight"], value)


def test_what_is_averaged_are_a_and_b(tmp_path: Path) -> None:
    """From ema_start = 1 on the average keeps 0.9 of what it was."""
    run = Run(config(tmp_path / "run", **LORA), ALONE)
    start = {name: value.clone() for name, value in run.average.items()}
    after = []
    for _ in range(3):
        run.train_step()
        own = {n: p.detach().clone() for n, p in run.models.generator.named_parameters()}
        after.append({name: own[name] for name in start})
    for name, value in run.average.items():
        second = 0.9 * after[0][name] + 0.1 * after[1][name]
        torch.testing.assert_close(value, 0.9 * second + 0.1 * after[2][name])
        assert not torch.equal(value, start[name])


@pytest.mark.parametrize("recipe", ["tf", "sf+dmd"])
def test_resume_is_exact(recipe: str, tmp_path: Path) -> None:
    settings = config(tmp_path / "run", recipe, **LORA, lora_critic="+" in recipe)
    train(settings, device="cpu")
    whole = tmp_path / "run"
    part = config(tmp_path / "part", recipe, **LORA, lora_critic="+" in recipe)
    shutil.copytree(whole, part.output)
    shutil.rmtree(part.output / "checkpoints" / "step-000004")
    shutil.rmtree(part.output / "lora")
    torch.seed()
    train(part, resume=True, device="cpu")
    for name in (
        "checkpoints/step-000004/__0_0.distcp", "model.safetensors",
        "lora/adapter_model.safetensors", "lora/adapter_config.json",
    ):  # fmt: skip
        assert (whole / name).read_bytes() == (part.output / name).read_bytes(), name
    first, second = (
        [{k: v for k, v in line.items() if "seconds" not in k} for line in logged(folder)]
        for folder in (whole, part.output)
    )
    assert first == second
    with pytest.raises(ValueError, match="is of a run with lora_rank=2"):
        train(config(part.output, recipe, **LORA | {"lora_rank": 3}), resume=True, device="cpu")


def test_samples_and_streams_have_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model of the start with the LoRA is that of the whole weights."""
    draw_pictures(monkeypatch)
    settings = config(tmp_path / "run", steps=1, save_every=1, **LORA)
    path = train(settings, device="cpu")
    assert (tmp_path / "run" / "samples" / "update-000001.png").is_file()
    loras = [Lora(tmp_path / "run" / "lora")]
    merged = load_model("toy", settings.init, ALONE.device, loras=loras).state_dict()
    for name, value in load_model("toy", path, ALONE.device).state_dict().items():
        torch.testing.assert_close(merged[name], value)


def test_it_learns(tmp_path: Path) -> None:
    settings = config(
        tmp_path / "run", steps=40, batch=16, chunks=(3,), windows=(4,), lr=2e-2, lora_rank=8,
        log_every=10, save_every=40,
    )  # fmt: skip
    train(settings, device="cpu")
    losses = [line["loss"] for line in logged(tmp_path / "run")]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--lora-rank -1", "lora_rank=-1: must be at least 0"),
        ("--lora-rank 2 --lora-alpha 0", "lora_alpha=0.0: must be more than 0"),
        ("--lora-rank 2 --lora-targets q v", "self_attn.q, self_attn.k, self_attn.v are one layer"),
        ("--lora-rank 2 --lora-targets cross_attn.v", "cross_attn.k, cross_attn.v are one layer"),
        ("--lora-rank 2 --lora-targets attn", "'attn': must be the end of one of self_attn.q"),
        ("--lora-critic", "lora_critic: goes with a lora_rank"),
        ("--lora-rank 2", "lora_rank=2: a LoRA changes weights: give init"),
    ],
)  # fmt: skip
def test_what_is_refused(
    words: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [*words.split(), "--output", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as stopped:
        run_command("sfmodel", {"train": train_command(given)}, ["train", *given])
    assert stopped.value.code == 2 and said in capsys.readouterr().err
