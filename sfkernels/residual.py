"""The end of a residual branch where no norm of ours follows, as at the end of a block of another
model. Shapes are named as in reference.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sfkernels import reference
from sfkernels.arguments import (
    check_modulation,
    check_same,
    check_shape,
    check_tensor,
    without_token_dim,
)
from sfkernels.dispatch import choose, contiguous_like, dense, derivatives, kernel, registered


def gated_residual(x_BLC: Tensor, y_BLC: Tensor, gate_BFC: Tensor, *, impl: str = "auto") -> Tensor:
    """`x + gate · y`, [B, L, C] in x's dtype, computed in float32 and rounded once.

    x, y [B, L, C]; gate [B or 1, F or 1, C], or [B or 1, F or 1, 1, C], for each latent frame of
    L/F tokens. Raises ValueError for shapes that do not fit."""
    gate_BFC = without_token_dim(gate_BFC)
    _check(x_BLC, y_BLC, gate_BFC)
    impl = _choose(impl, x_BLC, y_BLC, gate_BFC)
    if impl == "reference":
        return reference.residual(x_BLC, y_BLC, gate_BFC)
    out_BLC: Tensor = _gated_residual(x_BLC, y_BLC, gate_BFC, impl)
    return out_BLC


@registered("gated_residual")
def _gated_residual(x: Tensor, y: Tensor, gate: Tensor, impl: str) -> Tensor:
    _check(x, y, gate)
    _choose(impl, x, y, gate)
    out: Tensor = kernel(impl, "gated_residual_fwd")(x, y, gate)
    return out


@_gated_residual.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return contiguous_like(x)


@registered("gated_residual_bwd")
def _gated_residual_bwd(dout: Tensor, y: Tensor, gate: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    """dy, dgate."""
    _check(y, dout, gate)
    _choose(impl, y, dout, gate)
    dy, dgate = kernel(impl, "gated_residual_bwd")(dout, y, gate)
    return dy, dgate


@_gated_residual_bwd.register_fake
def _(dout: Tensor, y: Tensor, gate: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    return contiguous_like(y), contiguous_like(gate)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    _, y, gate, ctx.impl = inputs
    ctx.save_for_backward(y, gate)


def _backward(ctx: Any, dout: Tensor) -> Any:
    y, gate = ctx.saved_tensors
    if torch.is_grad_enabled():

        def branch(y: Tensor, gate: Tensor) -> Tensor:
            return reference.residual(torch.zeros_like(y), y, gate)

        return dout, *derivatives(branch, (y, gate), dout), None
    return dout, *_gated_residual_bwd(dense(dout), y, gate, ctx.impl), None


_gated_residual.register_autograd(_backward, setup_context=_setup_context)


def _check(x_BLC: Tensor, y_BLC: Tensor, gate_BFC: Tensor) -> None:
    check_tensor("gate", gate_BFC)
    check_modulation(x_BLC, gate=gate_BFC)
    check_shape("y", y_BLC, tuple(x_BLC.shape))
    check_same("y", y_BLC, "x", x_BLC)


def _choose(impl: str, x_BLC: Tensor, y_BLC: Tensor, gate_BFC: Tensor) -> str:
    return choose("gated_residual", impl, x_BLC.device, x=x_BLC, y=y_BLC, gate=gate_BFC)
