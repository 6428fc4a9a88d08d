"""Rows in 8 bits, each with a scale of its own. Shapes are named as in reference.py."""

from __future__ import annotations

import torch
from torch import Tensor

from sfkernels import reference
from sfkernels.arguments import check_floating, check_shape
from sfkernels.dispatch import choose, kernel, registered


@torch.no_grad()
def quantize_rows(
    x_BLC: Tensor, *, dtype: torch.dtype = torch.int8, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """x [B, L, C] as 8-bit numbers q [B, L, C] in `dtype` (torch.int8 or torch.float8_e4m3fn) and a
    scale for each row, [B, L] in float32: x ≈ q · scale.

    With amax = max |x| of a row, and largest = 127 or 448: scale = amax / largest and
    q = x · (largest / amax), rounded to the nearest number of `dtype`, ties to even, all in float32
    (float64 for float64 x, by the reference alone); every implementation gives the same bits. Where
    largest / amax overflows, as in a row of zeros, q is 0. In a row that has a NaN or an infinity,
    so is the scale (NaN if it has both) and q is unspecified. Returns tensors without a graph.
    Raises ValueError for shapes and dtypes that do not fit."""
    impl = _check(x_BLC, dtype, impl)
    if impl == "reference":
        return reference.quantize_rows(x_BLC, dtype)
    q_BLC, scale_BL = _quantize_rows(x_BLC, dtype, impl)
    return q_BLC, scale_BL


def _check(x_BLC: Tensor, dtype: torch.dtype, impl: str) -> str:
    """The implementation to take."""
    check_shape("x", x_BLC, ("B", "L", "C"))
    check_floating("x", x_BLC)
    if not x_BLC.shape[2]:
        raise ValueError(f"x has shape {[*x_BLC.shape]}: its rows must have an element")
    if not isinstance(dtype, torch.dtype) or dtype not in reference.LARGEST:
        wanted = " or ".join(map(str, reference.LARGEST))
        raise ValueError(f"dtype is {dtype}: must be {wanted}")
    return choose("quantize_rows", impl, x_BLC.device, x=x_BLC)


@registered("quantize_rows")
def _quantize_rows(x: Tensor, dtype: torch.dtype, impl: str) -> tuple[Tensor, Tensor]:
    if impl != "cpp":  # which looks for itself
        _check(x, dtype, impl)
    q, scale = kernel(impl, "quantize_rows")(x, dtype)
    return q, scale


@_quantize_rows.register_fake
def _(x: Tensor, dtype: torch.dtype, impl: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape[:2], dtype=torch.float32)
