"""What training keeps in memory, counted, beside the formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bench.memory import kept_elements, training_gib
from sfkernels import BlockLayout
from sfmodel.config import PRESETS, DiTConfig
from sfmodel.dit import DiT, TextKeys

FRAMES, GRID = 2, 4


def kept(config: DiTConfig, recompute: bool) -> float:
    """Elements that autograd keeps of one token, weights and prompt left out."""
    torch.manual_seed(0)
    model = DiT(config, "triton", "triton", recompute)
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
    assert gib["weights"] == pytest.approx((36 * 1.419e9 + 2 * 14.29e9) / 8 / 2**30, rel=0.01)
    assert gib["cache"] == pytest.approx(21 * 274 / 1024, rel=0.01)
    alone = training_gib(PRESETS["wan-1.3b"], "sf+dmd")
    assert alone["activations"] == gib["activations"] and alone["total"] > gib["total"]
