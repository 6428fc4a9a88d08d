"""How many kernels a pass of the stream launches: of each block, and beside the blocks."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sfkernels import launch
from sfmodel.config import DiTConfig
from sfmodel.dit import DiT

pytestmark = pytest.mark.gpu
GRID, FRAMES, WINDOW = (4, 8), 3, 21
NO_KERNEL = {"aten::_unsafe_view", "aten::empty", "aten::detach"}


class Launches(TorchDispatchMode):
    """Counts what PyTorch launches, views left out; `launch.run` counts ours."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name.startswith("aten") and not func.is_view and name not in NO_KERNEL:
            self.found[name.removeprefix("aten::")] += 1
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def launches(layers: int, merged: bool, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    config = DiTConfig(128, 256, 2, layers, channels=4, text_dim=8, text_len=6)
    model = DiT(config, "triton", "triton", "torch").to("cuda", torch.bfloat16)
    cache = model.new_cache(1, WINDOW, GRID)
    model.set_text(cache, torch.zeros(1, 6, 8, device="cuda"))
    x: Tensor = torch.zeros(1, FRAMES, 4, 2 * GRID[0], 2 * GRID[1], device="cuda")
    modulation, places = model.modulation(torch.tensor(500.0, device="cuda")), []
    if merged:
        modulation = modulation.behind(modulation, FRAMES, FRAMES)
        places.append(model.place(cache, FRAMES, GRID))
    places.append(model.place(cache, FRAMES, GRID, FRAMES * merged))
    clean, run, counting = x if merged else None, launch.run, Launches()

    def counted(kernel: Any, *args: Any, **options: Any) -> Any:
        counting.found[kernel.fn.__name__.strip("_").removesuffix("_kernel")] += 1
        return run(kernel, *args, **options)

    monkeypatch.setattr(launch, "run", counted)
    with counting:
        model(x, modulation, None, clean_BFCHW=clean, cache=cache, places=places)
    monkeypatch.undo()
    return counting.found


@pytest.mark.parametrize("merged", [False, True])
def test_of_a_pass(merged: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block: q, k, v and attention's output, those of the text, the FFN with GELU in its first
    product; the norms; append and attention over the ring, whose parts it joins, for each of the
    two chunks of a merged pass, whose outputs are put side by side; attention to the text."""
    three, four, five = (launches(layers, merged, monkeypatch) for layers in (3, 4, 5))
    block = {"addmm": 5, "_addmm_activation": 1, "norm_fwd": 4, "attention_fwd": 2 + merged,
             "qk_norm_rope_fwd": 1 + merged}  # fmt: skip
    block |= {"cat": 1} if merged else {}
    assert five - four == four - three == block
    assert sum(block.values()) == 13 + 3 * merged
    beside = three - Counter({name: 3 * count for name, count in block.items()})
    assert beside.total() <= 12, beside
