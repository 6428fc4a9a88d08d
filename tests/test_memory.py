"""What training keeps in memory and what decoders take, counted, beside the formulas."""

from __future__ import annotations

import weakref
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
from sfmodel.training_memory import kept_elements, training_gib
from sfmodel.vae.taehv import TinyVAE
from sfmodel.vae.wan import WanVAE

FRAMES, GRID = 2, 4


def kept(config: DiTConfig, recompute: bool) -> float:
    """Elements that autograd keeps of one token, weights and prompt left out."""
    torch.manual_seed(0)
    model = DiT(config, "triton", "triton", recompute=recompute)
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
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("dim", "ffn", "heads"), [(32, 32, 1), (64, 160, 2)])
def test_what_a_block_keeps(dim: int, ffn: int, heads: int, recompute: bool) -> None:
    """By the difference of two depths."""
    shallow, deep = (
        DiTConfig(dim, ffn, heads, layers, channels=4, patch=(1, 1, 1), freq_dim=16, text_dim=8,
                  text_len=2)
        for layers in (1, 2)
    )  # fmt: skip
    got = kept(deep, recompute) - kept(shallow, recompute)
    want = kept_elements(deep, recompute) - kept_elements(shallow, recompute)
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
