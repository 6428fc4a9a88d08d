"""Weights that a checkpoint holds in 8 bits: numbers and the scales beside them, as the tensors
that they stand for.

ComfyUI's files have one scale a layer (`scale_weight`, or `weight_scale`), LightX2V's one for each
row (`weight_scale`), in FP8 or INT8; files that were merely cast to FP8 have none.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

FLOATS = (torch.float8_e4m3fn, torch.float8_e5m2)
EIGHT_BITS = (*FLOATS, torch.int8)
SCALES = ("scale_weight", "weight_scale")
# What else is beside them: scales of activations, and a mark of the format.
BESIDE = re.compile(r"(^|[._])(scale_input|input_scale|scaled_fp8)$")


class Scaled(Tensor):
    """A float32 tensor that is `numbers` · `scale`, computed whenever it is used: until then it
    takes no memory beside the file that numbers are mapped from. scale: of one number, or of one
    for each row; None: 1."""

    numbers: Tensor
    scale: Tensor | None

    @staticmethod
    def __new__(cls, numbers: Tensor, scale: Tensor | None) -> Scaled:
        made: Scaled = torch.Tensor._make_wrapper_subclass(
            cls, numbers.shape, dtype=torch.float32, device=numbers.device
        )
        made.numbers, made.scale = numbers, scale
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Scaled({[*self.shape]}, {self.numbers.dtype})"

    def computed(self) -> Tensor:
        """The tensor itself."""
        values = self.numbers.float()
        if self.scale is None:
            return values
        rows = (-1,) + (1,) * (values.dim() - 1) if self.scale.numel() > 1 else ()
        return values.mul_(self.scale.float().reshape(rows))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        def plain(x: Any) -> Any:
            return x.computed() if isinstance(x, Scaled) else x

        return func(*pytree.tree_map(plain, args), **pytree.tree_map(plain, kwargs or {}))


def with_scales(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state whose 8-bit weights are `Scaled`, without what stands beside them. INT8 without a
    scale stays as it is, and so does what has a scale that fits nothing."""
    if not any(x.dtype in EIGHT_BITS for x in state.values()):
        return dict(state)
    out, used = {}, set()
    for key, x in state.items():
        if x.dtype not in EIGHT_BITS:
            continue
        name = scale_of(key, state)
        scale = None if name is None else state[name]
        if scale is None and x.dtype in FLOATS and not BESIDE.search(key):
            out[key] = Scaled(x, None)
        elif scale is not None and _fits(scale, x):
            out[key] = Scaled(x, scale)
            used.add(name)
    return {
        key: out.get(key, x)
        for key, x in state.items()
        if key not in used and not BESIDE.search(key)
    }


def scale_of(key: str, state: Mapping[str, Tensor]) -> str | None:
    """Name of the scale that stands beside a weight; None where there is none."""
    stem = key.removesuffix("weight")
    return next((stem + each for each in SCALES if stem + each in state), None)


def _fits(scale: Tensor, numbers: Tensor) -> bool:
    """Tells whether a scale is of one number, or of one for each row, none of them 0 or NaN."""
    if scale.is_meta or not scale.is_floating_point():
        return False
    if not bool((scale.float().isfinite() & (scale != 0)).all()):
        return False
    by_row = bool(numbers.dim()) and scale.shape[:1] == numbers.shape[:1]
    return scale.numel() == 1 or (by_row and scale.numel() == len(numbers))


def stored_dtype(x: Tensor) -> torch.dtype:
    """The type that a tensor has in its file."""
    return x.numbers.dtype if isinstance(x, Scaled) else x.dtype
