"""What training keeps in memory and what decoders take, counted, beside the formulas."""

from __future__ import annotations

import gc
import os
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import sfkernels as sf
from sfkernels import BlockLayout
from sfmodel.blocks import TextKeys
from sfmodel.config import PRESETS, DiTConfig
from sfmodel.cost import GIB, decoder_gib
from sfmodel.dit import DiT
from sfmodel.ranks import Ranks
from sfmodel.train import objectives
from sfmodel.train.batch import MicroBatch
from sfmodel.train.config import RECIPES, TrainConfig
from sfmodel.train.loop import Run
from sfmodel.train.lora import Adapter
from sfmodel.train.objectives.dmd import DMD
from sfmodel.train.objectives.flow import FlowMatching
from sfmodel.train.rollout import Rollout
from sfmodel.training_memory import kept_elements, training_gib
from sfmodel.vae.taehv import TinyVAE
from sfmodel.vae.wan import WanVAE
from tests.tiny_runs import config, tiny

FRAMES, GRID = 2, 4


def kept(config: DiTConfig, recompute: bool, rank: int) -> float:
    """Elements that autograd keeps of one token, weights and prompt left out. rank: of a LoRA."""
    torch.manual_seed(0)
    model = DiT(config, "triton", "triton", recompute=recompute)
    if rank:
        Adapter(rank, 1.0).add(model)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes: dict[int, int] = {}
    alive: list[Tensor] = []  # a freed storage's address may come again

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes() // 4
            alive.append(tensor)
        return tensor

    text = model.text_keys(torch.zeros(1, 2, config.text_dim))
    keys = TextKeys(*([each.detach() for each in side] for side in text))
    x = torch.randn(1, FRAMES, config.channels, GRID, GRID)
    layout = BlockLayout((FRAMES,), GRID * GRID)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(x, torch.tensor(500.0), keys, layout=layout)
    assert out.requires_grad
    return sum(sizes.values()) / (FRAMES * GRID * GRID)


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts the interpreter's tensors")
@pytest.mark.parametrize(("recompute", "rank"), [(False, 0), (True, 0), (False, 6)])
@pytest.mark.parametrize(("dim", "ffn", "heads"), [(32, 32, 1), (64, 160, 2)])
def test_what_a_block_keeps(dim: int, ffn: int, heads: int, recompute: bool, rank: int) -> None:
    """By the difference of two depths."""
    shallow, deep = (
        DiTConfig(dim, ffn, heads, layers, channels=4, patch=(1, 1, 1), freq_dim=16, text_dim=8,
                  text_len=2)
        for layers in (1, 2)
    )  # fmt: skip
    got = kept(deep, recompute, rank) - kept(shallow, recompute, rank)
    want = kept_elements(deep, recompute, rank) - kept_elements(shallow, recompute, rank)
    assert got == pytest.approx(want, rel=0.02)


def test_a_generator_step_of_the_paper() -> None:
    """1.3B beside a real score of 14B, from the numbers of parameters alone."""
    gib = training_gib(PRESETS["wan-1.3b"], "sf+dmd", 8, PRESETS["wan-14b"])
    assert gib["weights"] == pytest.approx((8 * 1.419e9 + 2 * 14.29e9) / 8 / 2**30, rel=0.01)
    learned = gib["gradients"] + gib["moments"] + gib["average"]
    assert learned == pytest.approx(28 * 1.419e9 / 8 / 2**30, rel=0.01)
    assert gib["cache"] == pytest.approx(21 * 274 / 1024, rel=0.01)
    alone = training_gib(PRESETS["wan-1.3b"], "sf+dmd")
    assert alone["activations"] == gib["activations"] and alone["total"] > gib["total"]


class Counting(TorchDispatchMode):
    """Bytes of the storages that are alive, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(out):
            storage = tensor.untyped_storage() if isinstance(tensor, Tensor) else None
            if storage is not None and storage._cdata not in self.known:
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.gone, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def gone(self, which: int, nbytes: int) -> None:
        self.known.discard(which)
        self.now -= nbytes


def held(settings: TrainConfig, updates: int = 6) -> list[tuple[int, int, int]]:
    """Bytes of tensors, open files and threads after each update of a run, of those that came since
    it began. Python collects no garbage meanwhile: none of them may wait for that."""
    run = Run(settings, Ranks(0, 1, torch.device("cpu")))
    run.prepare()
    found = []
    gc.collect()
    gc.disable()
    try:
        with Counting() as counted:
            for _ in range(updates):
                run.train_step()
                if run.step % 4 == 1:
                    run.save()
                files, threads = (len(os.listdir(f"/proc/self/{name}")) for name in ("fd", "task"))
                found.append((counted.now, files, threads))
    finally:
        gc.enable()
    return found


ONE: dict[str, Any] = {"chunks": (3,), "windows": (4,), "batch": 2, "critic_warmup": 0}


@pytest.mark.parametrize(
    ("recipe", "change"),
    [*((recipe, {}) for recipe in RECIPES), ("sf+dmd", {"lora_rank": 2, "lora_critic": True}),
     ("tf", {"bf16": True, "recompute": True, "micro_batch": 1, "optimizer": "muon"})],
)  # fmt: skip
def test_updates_leave_nothing_behind(recipe: str, change: dict[str, Any], tmp_path: Path) -> None:
    """From the second one on, at one size of clips and chunks. ODE sees two layouts by turns."""
    with tiny():
        found = held(config(tmp_path / "run", recipe, **ONE, **change))
    first = 2 if recipe == "ode" else 1
    assert {nbytes for nbytes, _, _ in found[first:]} == {found[first][0]} and found[first][0]
    for now, then in zip(found[first:], found[first + 1 :], strict=False):
        assert then[1] <= now[1] and then[2] <= now[2]


def test_what_is_left_behind_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss that is kept with its graph, and a file that is not closed."""
    kept: list[Any] = []
    loss = FlowMatching.generator_loss

    def keeping(self: FlowMatching, batch: MicroBatch) -> Tensor:
        kept.extend((loss(self, batch), os.open(os.devnull, os.O_RDONLY)))
        return kept[-2]

    monkeypatch.setattr(FlowMatching, "generator_loss", keeping)
    with tiny():
        found = held(config(tmp_path / "run", **ONE), 3)
    assert found[1][0] < found[2][0] and found[1][1] < found[2][1]
    for file in kept[1::2]:
        os.close(file)


def test_a_critic_learns_without_the_rollout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose keys and values are as large as what a critic's update keeps."""
    made: list[weakref.ref[Rollout]] = []

    class Noted(Rollout):
        def __post_init__(self) -> None:
            super().__post_init__()
            made.append(weakref.ref(self))

    loss = DMD.critic_loss

    def alone(self: DMD, batch: MicroBatch, video: Tensor) -> Tensor:
        assert made and made[-1]() is None
        return loss(self, batch, video)

    monkeypatch.setattr(objectives, "Rollout", Noted)
    monkeypatch.setattr(DMD, "critic_loss", alone)
    with tiny():
        Run(
            config(tmp_path / "run", "sf+dmd", **ONE), Ranks(0, 1, torch.device("cpu"))
        ).train_step()
    assert len(made) == 2


@pytest.mark.parametrize(("decoder", "build"), [("wan", WanVAE), ("taehv", TinyVAE)])
def test_what_a_decoder_takes(decoder: str, build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """At real size on tensors without values; kernels allocate their outputs, as on a GPU, and
    convolutions theirs with channels last. The states before and after are counted."""

    def fused(x_BLC: Tensor, _: Tensor, y_BLC: Any = None, **more: Any) -> Any:
        B, L, C = x_BLC.shape
        before = 0 if more["before_BPC"] is None else more["before_BPC"].shape[1]
        total = None if y_BLC is None else torch.empty_like(x_BLC)
        return total, x_BLC.new_empty(B, before + L, C)

    def convolved(
        x: Tensor, weight: Tensor, bias: Any = None, stride: Any = 1, padding: Any = 0, *_: Any
    ) -> Tensor:
        pads = [padding] * (x.dim() - 2) if isinstance(padding, int) else padding
        sizes = zip(x.shape[2:], weight.shape[2:], pads, strict=True)
        size = [n - taps + 1 + 2 * pad for n, taps, pad in sizes]
        return x.new_empty(len(x), *size, len(weight)).movedim(-1, 1)

    monkeypatch.setattr(sf, "rms_norm_silu", fused)
    monkeypatch.setattr(F, "conv2d", convolved)
    monkeypatch.setattr(F, "conv3d", convolved)
    with torch.device("meta"):
        vae, latents = build().bfloat16().requires_grad_(False), torch.empty(1, 3, 16, 60, 104)
    _, state = vae.decode_chunk(latents)
    with Counting() as counted:
        vae.decode_chunk(latents, state)
    weights = sum(2 * p.numel() for p in vae.parameters())
    formula = decoder_gib(PRESETS["wan-1.3b"], decoder)
    assert (counted.peak + weights) / GIB == pytest.approx(formula, rel=0.03)
