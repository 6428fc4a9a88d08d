"""Cases that the tests of Hopper's forward and backward kernels share."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from sfkernels import BlockLayout
from sfkernels.gpu.tiles import Pattern
from sfkernels.launch import Tile

BF16, FP16 = torch.bfloat16, torch.float16
LAYOUTS = {
    "bidirectional": BlockLayout((3,), 45),
    "diffusion forcing": BlockLayout.causal(6, 2, 47),
    "teacher forcing": BlockLayout.causal(3, 1, 43, teacher_forcing=True),
    "window": BlockLayout.causal(5, 1, 41, window=2),
    "window and sink": BlockLayout.causal(6, 1, 37, window=3, sink=1),
    "teacher forcing, window and sink": BlockLayout.causal(
        5, 1, 23, window=3, sink=1, teacher_forcing=True
    ),
    "independent first frame": BlockLayout.causal(5, 2, 33, first=1),
    "hidden first chunk": BlockLayout.causal(6, 2, 25, hide_first=True),
    "smaller than a tile": BlockLayout.causal(2, 1, 5),
}
# Few tokens a visited tile, so that short spans have several.
TILES = [Tile(128, 32, 4, 2), Tile(128, 64, 4, 3), Tile(128, 128, 4, 2)]


def rows_of(layout: BlockLayout) -> Pattern:
    return tuple((row.queries, row.keys) for row in layout.rows)


def attend(q: Tensor, k: Tensor, v: Tensor, seen_LS: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Eager attention in the tensors' dtype, and lse to base 2. Queries that see nothing: NaN, and
    no gradient."""
    sees_L = seen_LS.any(1)
    s_BHLS = torch.einsum("blhd,bshd->bhls", q[:, sees_L], k) * scale
    s_BHLS = s_BHLS.masked_fill(~seen_LS[sees_L], -torch.inf)
    o_BLHD, lse_BHL = torch.full_like(q, torch.nan), q.new_full(q.shape[:3], -torch.inf).mT
    o_BLHD[:, sees_L] = torch.einsum("bhls,bshd->blhd", s_BHLS.softmax(-1), v)
    lse_BHL[..., sees_L] = s_BHLS.detach().logsumexp(-1) / torch.tensor(2.0).double().log()
    return o_BLHD, lse_BHL


def new(
    layout: BlockLayout, batch: int, heads: int, head_dim: int, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    return tuple(torch.randn(batch, layout.tokens, heads, head_dim).to(dtype) for _ in range(3))


def mutant(
    original: ModuleType, changes: Mapping[str, str], folder: Path, user: ModuleType | None = None
) -> ModuleType:
    """A module of kernels with some text replaced. user: another one, which gets the mutant in the
    place of the original and is returned."""
    assert original.__file__
    text = Path(original.__file__).read_text()
    for old, new in changes.items():
        assert text.count(old) == 1, (text.count(old), old)
        text = text.replace(old, new)
    (folder / "mutant.py").write_text(text)
    spec = importlib.util.spec_from_file_location("mutant", folder / "mutant.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if user is None:
        return module
    sys.modules["mutant"] = module
    try:
        (folder / "user").mkdir()
        return mutant(user, {original.__name__: "mutant"}, folder / "user")
    finally:
        del sys.modules["mutant"]
