"""Normalisation and modulation of a DiT block and of a VAE. Shapes are named as in reference.py.

Every function here is one form of the same kernel, registered as `sfkernels::norm`, with a residual
connection before the norm `sfkernels::residual_norm`, and with SiLU after it
`sfkernels::rms_norm_silu`.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from sfkernels import reference
from sfkernels.arguments import (
    check_modulation,
    check_positive,
    check_same,
    check_shape,
    without_token_dim,
)
from sfkernels.dispatch import choose, contiguous_like, dense, derivatives, kernel, registered


def layer_norm(
    x_BLC: Tensor, weight_C: Tensor, bias_C: Tensor, *, eps: float = 1e-6, impl: str = "auto"
) -> Tensor:
    """LayerNorm over the last dimension with weight and bias [C]; returns [B, L, C].
    Raises ValueError for shapes that do not fit."""
    _check_affine(x_BLC, weight=weight_C, bias=bias_C)
    impl = _choose(impl, eps, x_BLC, weight=weight_C, bias=bias_C)
    if impl == "reference":
        return reference.layer_norm(x_BLC, weight_C, bias_C, eps)
    return _norm(x_BLC, weight_C[None, None], bias_C[None, None], eps, True, False, impl)[0]


def rms_norm(x_BLC: Tensor, weight_C: Tensor, *, eps: float = 1e-6, impl: str = "auto") -> Tensor:
    """`x / sqrt(mean(x²) + eps) · weight` over the last dimension; returns [B, L, C].
    Raises ValueError for shapes that do not fit."""
    _check_affine(x_BLC, weight=weight_C)
    impl = _choose(impl, eps, x_BLC, weight=weight_C)
    if impl == "reference":
        return reference.rms_norm(x_BLC, weight_C, eps)
    return _norm(x_BLC, weight_C[None, None], None, eps, False, False, impl)[0]


def adaln(
    x_BLC: Tensor, shift_BFC: Tensor, scale_BFC: Tensor, *, eps: float = 1e-6, impl: str = "auto"
) -> Tensor:
    """LayerNorm without affine, then `· (1 + scale) + shift` per latent frame (Wan2.1).

    x [B, L, C] with L a multiple of F; shift, scale [B or 1, F or 1, C] or [B or 1, F or 1, 1, C],
    possibly strided views of a larger modulation and in a wider dtype. Returns [B, L, C] in x's
    dtype. Raises ValueError for shapes that do not fit."""
    shift_BFC, scale_BFC = map(without_token_dim, (shift_BFC, scale_BFC))
    check_modulation(x_BLC, shift=shift_BFC, scale=scale_BFC)
    impl = _choose(impl, eps, x_BLC, shift=shift_BFC, scale=scale_BFC)
    if impl == "reference":
        return reference.adaln(x_BLC, shift_BFC, scale_BFC, eps)
    return _norm(x_BLC, scale_BFC, shift_BFC, eps, True, True, impl)[0]


def gated_adaln(
    x_BLC: Tensor,
    y_BLC: Tensor,
    gate_BFC: Tensor | None,
    shift_BFC: Tensor,
    scale_BFC: Tensor,
    *,
    eps: float = 1e-6,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The end of one residual branch and the start of the next: returns `x' = x + gate · y` and
    `adaln(x', shift, scale)`, both [B, L, C] in x's dtype. Without a gate, x' = x + y.

    x, y [B, L, C]; gate, shift, scale as in `adaln`. Raises ValueError for shapes that do not
    fit."""
    _check_residual(x_BLC, y=y_BLC)
    gate_BFC, shift_BFC, scale_BFC = map(without_token_dim, (gate_BFC, shift_BFC, scale_BFC))
    modulations = dict(gate=gate_BFC, shift=shift_BFC, scale=scale_BFC)
    check_modulation(x_BLC, **modulations)
    impl = _choose(impl, eps, x_BLC, y=y_BLC, **modulations)
    if impl == "reference":
        return reference.gated_adaln(x_BLC, y_BLC, gate_BFC, shift_BFC, scale_BFC, eps)
    args = gate_BFC, scale_BFC, shift_BFC
    residual_BLC, out_BLC, _ = _residual_norm(x_BLC, y_BLC, *args, eps, True, impl)
    return residual_BLC, out_BLC


def gated_layer_norm(
    x_BLC: Tensor,
    y_BLC: Tensor,
    gate_BFC: Tensor | None,
    weight_C: Tensor,
    bias_C: Tensor,
    *,
    eps: float = 1e-6,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The end of a residual branch and the affine LayerNorm after it: returns `x' = x + gate · y`
    and `layer_norm(x', weight, bias)`.

    x, y [B, L, C]; gate as in `adaln`, or None; weight, bias [C]. Raises ValueError for shapes that
    do not fit."""
    _check_residual(x_BLC, y=y_BLC)
    gate_BFC = without_token_dim(gate_BFC)
    check_modulation(x_BLC, gate=gate_BFC)
    _check_affine(x_BLC, weight=weight_C, bias=bias_C)
    tensors = dict(y=y_BLC, gate=gate_BFC, weight=weight_C, bias=bias_C)
    impl = _choose(impl, eps, x_BLC, **tensors)
    if impl == "reference":
        return reference.gated_layer_norm(x_BLC, y_BLC, gate_BFC, weight_C, bias_C, eps)
    args = gate_BFC, weight_C[None, None], bias_C[None, None]
    residual_BLC, out_BLC, _ = _residual_norm(x_BLC, y_BLC, *args, eps, False, impl)
    return residual_BLC, out_BLC


def rms_norm_silu(
    x_BLC: Tensor,
    weight_C: Tensor,
    y_BLC: Tensor | None = None,
    *,
    bias_C: Tensor | None = None,
    before_BPC: Tensor | None = None,
    eps: float = 1e-6,
    impl: str = "auto",
) -> tuple[Tensor | None, Tensor]:
    """Residual, RMSNorm and SiLU before a causal convolution of a video VAE. Returns x' = x + y +
    bias, None without y, and `[before ‖ silu(rms_norm(x', weight))]`, in x's dtype.

    x, y [B, L, C], the tokens of the frames of a chunk; bias [C], that of the convolution before,
    which need not add it in a pass of its own; before [B, P, C], what this function gave for the
    frames that the convolution looks back at; weight [C]. Returns [B, L, C] and [B, P + L, C].
    Raises ValueError for shapes that do not fit."""
    impl = _choose_silu(impl, eps, x_BLC, weight_C, y_BLC, bias_C, before_BPC)
    if impl == "reference":
        out = reference.rms_norm_silu(x_BLC, weight_C, y_BLC, bias_C, before_BPC, eps)
    else:
        out = _rms_norm_silu(x_BLC, weight_C, y_BLC, bias_C, before_BPC, eps, impl)[:2]
    return None if y_BLC is None else out[0], out[1]


# The ops. `centred`: LayerNorm, else RMSNorm. `plus_one`: the factor is 1 + scale, else scale.


# They also return what their backward pass needs of each row, which has no gradient.


@registered("norm")
def _norm(
    x: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    eps: float,
    centred: bool,
    plus_one: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    _check_op(impl, x, dict(scale=scale, shift=shift), eps=eps)
    _, out, stats = kernel(impl, "norm_fwd")(x, None, None, scale, shift, eps, centred, plus_one)
    return out, stats


@_norm.register_fake
def _(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return contiguous_like(x), _stats(x)


@registered("norm_bwd")
def _norm_bwd(
    dout: Tensor,
    x: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    stats: Tensor,
    centred: bool,
    plus_one: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dscale, dshift (empty without a shift)."""
    dout = dense(dout)
    _check_op(impl, x, dict(scale=scale, shift=shift), dout=dout, stats=stats)
    dx, _, _, dscale, dshift = kernel(impl, "norm_bwd")(
        None, dout, x, None, None, scale, shift, stats, centred, plus_one
    )
    return dx, dscale, x.new_empty(0) if dshift is None else dshift


@_norm_bwd.register_fake
def _(dout: Tensor, x: Tensor, scale: Tensor, shift: Tensor | None, *_: Any) -> Any:
    return contiguous_like(x), contiguous_like(scale), _or_empty(shift, x)


def _norm_setup(ctx: Any, inputs: Any, output: Any) -> None:
    x, scale, shift, ctx.eps, *ctx.rest = inputs
    ctx.save_for_backward(x, scale, shift, output[1])
    ctx.set_materialize_grads(False)


def _norm_backward(ctx: Any, dout: Tensor | None, _: None) -> Any:
    x, scale, shift, stats = ctx.saved_tensors
    dout = torch.zeros_like(x) if dout is None else dout
    if torch.is_grad_enabled():
        plain = functools.partial(_plain_norm, ctx.eps, *ctx.rest[:2])
        dx, dscale, dshift = derivatives(plain, (x, scale, shift), dout)
    else:
        dx, dscale, dshift = _norm_bwd(dout, x, scale, shift, stats, *ctx.rest)
    return dx, dscale, None if shift is None else dshift, None, None, None, None


def _plain_norm(
    eps: float, centred: bool, plus_one: bool, x: Tensor, scale: Tensor, shift: Tensor | None
) -> Tensor:
    """The reference of `_norm`, for derivatives of its derivatives."""
    if shift is None:
        assert not centred and not plus_one
        return reference.rms_norm(x, scale[0, 0], eps)
    if plus_one:
        return reference.adaln(x, shift, scale, eps)
    return reference.layer_norm(x, scale[0, 0], shift[0, 0], eps)


_norm.register_autograd(_norm_backward, setup_context=_norm_setup)


@registered("residual_norm")
def _residual_norm(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    plus_one: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_op(impl, x, dict(gate=gate, scale=scale, shift=shift), eps=eps, y=y)
    residual, out, stats = kernel(impl, "norm_fwd")(x, y, gate, scale, shift, eps, True, plus_one)
    return residual, out, stats


@_residual_norm.register_fake
def _(x: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return contiguous_like(x), contiguous_like(x), _stats(x)


@registered("residual_norm_bwd")
def _residual_norm_bwd(
    dresidual: Tensor,
    dout: Tensor,
    residual: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    stats: Tensor,
    plus_one: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx, dy, dgate, dscale, dshift; dy (which is dx) and dgate are empty without a gate."""
    dresidual, dout = dense(dresidual), dense(dout)
    if gate is not None and y is None:
        raise ValueError("gate is given without y, which its gradient needs")
    modulations = dict(gate=gate, scale=scale, shift=shift)
    _check_op(impl, residual, modulations, dout=dout, stats=stats, y=y, dresidual=dresidual)
    dx, dy, dgate, dscale, dshift = kernel(impl, "norm_bwd")(
        dresidual, dout, residual, y, gate, scale, shift, stats, True, plus_one
    )
    if gate is None:
        dy, dgate = residual.new_empty(0), residual.new_empty(0)
    return dx, dy, dgate, dscale, dshift


@_residual_norm_bwd.register_fake
def _(
    dresidual: Tensor,
    dout: Tensor,
    residual: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    *_: Any,
) -> Any:
    dy = _or_empty(None if gate is None else residual, residual)
    dmodulations = _or_empty(gate, residual), contiguous_like(scale), contiguous_like(shift)
    return contiguous_like(residual), dy, *dmodulations


def _residual_norm_setup(ctx: Any, inputs: Any, output: Any) -> None:
    _, y, gate, scale, shift, ctx.eps, *ctx.rest = inputs
    residual, _, stats = output
    # Without a gate the backward pass does not need y.
    ctx.save_for_backward(residual, None if gate is None else y, gate, scale, shift, stats)
    ctx.set_materialize_grads(False)


def _residual_norm_backward(
    ctx: Any, dresidual: Tensor | None, dout: Tensor | None, _: None
) -> Any:
    saved = ctx.saved_tensors  # once: checkpointing recomputes what is asked for and drops it
    residual, y, gate, scale, shift, _ = saved
    dresidual = torch.zeros_like(residual) if dresidual is None else dresidual
    dout = torch.zeros_like(residual) if dout is None else dout
    if torch.is_grad_enabled():

        def plain(x: Tensor, *modulation: Tensor) -> tuple[Tensor, Tensor]:
            return x, _plain_norm(ctx.eps, True, ctx.rest[0], x, *modulation)

        dx, dscale, dshift = derivatives(plain, (residual, scale, shift), dresidual, dout)
        dy, dgate = dx, None
        if gate is not None:
            branch = functools.partial(reference.residual, torch.zeros_like(residual))
            dy, dgate = derivatives(branch, (y, gate), dx)
        return dx, dy, dgate, dscale, dshift, None, None, None
    dx, dy, dgate, dscale, dshift = _residual_norm_bwd(dresidual, dout, *saved, *ctx.rest)
    if gate is None:
        dy, dgate = dx, None
    return dx, dy, dgate, dscale, dshift, None, None, None


_residual_norm.register_autograd(_residual_norm_backward, setup_context=_residual_norm_setup)


@registered("rms_norm_silu")
def _rms_norm_silu(
    x: Tensor,
    weight: Tensor,
    y: Tensor | None,
    bias: Tensor | None,
    before: Tensor | None,
    eps: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The first output is empty without y."""
    if impl != "cpp":
        _choose_silu(impl, eps, x, weight, y, bias, before)
    scale = _as_modulation(weight)
    residual, out, stats = kernel(impl, "norm_fwd")(
        x, y, None, scale, None, eps, False, False, silu=True, bias_C=bias, before_BPC=before
    )
    return x.new_empty(0) if residual is None else residual, out, stats


@_rms_norm_silu.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    y: Tensor | None,
    bias: Tensor | None,
    before: Tensor | None,
    *_: Any,
) -> Any:
    rows = x.shape[1] + (0 if before is None else before.shape[1])
    return _or_empty(y, x), x.new_empty(x.shape[0], rows, x.shape[2]), _stats(x)


@registered("rms_norm_silu_bwd")
def _rms_norm_silu_bwd(
    dresidual: Tensor | None, dout: Tensor, x: Tensor, weight: Tensor, stats: Tensor, impl: str
) -> tuple[Tensor, Tensor]:
    """dx, dweight. x: with y and the bias in it."""
    dout, scale = dense(dout), _as_modulation(weight)
    _check_op(impl, x, dict(weight=scale), dout=dout, stats=stats, dresidual=dresidual)
    dx, _, _, dscale, _ = kernel(impl, "norm_bwd")(
        dresidual, dout, x, None, None, scale, None, stats, False, False, silu=True
    )
    return dx, dscale.view(weight.shape)


@_rms_norm_silu_bwd.register_fake
def _(dresidual: Tensor | None, dout: Tensor, x: Tensor, weight: Tensor, *_: Any) -> Any:
    return contiguous_like(x), contiguous_like(weight)


def _rms_norm_silu_setup(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, y, bias, before, ctx.eps, ctx.impl = inputs
    residual, _, stats = output
    # The sum as it was stored; else it is taken again.
    ctx.save_for_backward(x if y is None else residual, weight, bias, stats)
    ctx.residual, ctx.looks_back = y is not None, before is not None
    ctx.rows = 0 if before is None else before.shape[1]
    ctx.set_materialize_grads(False)


def _rms_norm_silu_backward(
    ctx: Any, dresidual: Tensor | None, dout: Tensor | None, _: None
) -> Any:
    x, weight, bias, stats = ctx.saved_tensors
    dtype = x.dtype
    if bias is not None and not ctx.residual:
        x = x.float() + bias.float()
    if dout is None:
        dout = x.new_zeros(x.shape[0], ctx.rows + x.shape[1], x.shape[2])
    dresidual = dense(dresidual) if ctx.residual and dresidual is not None else None
    dnormed = dout[:, ctx.rows :]
    if torch.is_grad_enabled():

        def plain(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
            return reference.rms_norm_silu(x, weight, None, None, None, ctx.eps)

        dx, dweight = derivatives(plain, (x, weight), dresidual, dnormed.to(x.dtype))
    else:
        dx, dweight = _rms_norm_silu_bwd(dresidual, dnormed, x, weight, stats, ctx.impl)
    dbias = None if bias is None else dx.sum((0, 1), dtype=torch.float32).to(bias.dtype)
    dx = dx.to(dtype)
    dbefore = dout[:, : ctx.rows] if ctx.looks_back else None
    return dx, dweight, dx if ctx.residual else None, dbias, dbefore, None, None


_rms_norm_silu.register_autograd(_rms_norm_silu_backward, setup_context=_rms_norm_silu_setup)


def _stats(x: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:2], 2, dtype=torch.float32)


def _as_modulation(weight_C: Tensor) -> Tensor:
    check_shape("weight", weight_C, ("C",))
    return weight_C[None, None]


def _or_empty(t: Tensor | None, like: Tensor) -> Tensor:
    """Empty tensor for an output, without elements if it is absent."""
    return like.new_empty(0) if t is None else contiguous_like(t)


def _choose(impl: str, eps: float, x_BLC: Tensor, **tensors: Tensor | None) -> str:
    """Chooses the implementation; raises ValueError for what no norm takes."""
    check_positive("eps", eps)
    if not x_BLC.shape[2]:
        raise ValueError(f"x has shape {[*x_BLC.shape]}: its rows must have an element")
    return choose("norm", impl, x_BLC.device, x=x_BLC, **tensors)


def _choose_silu(
    impl: str,
    eps: float,
    x_BLC: Tensor,
    weight_C: Tensor,
    y_BLC: Tensor | None,
    bias_C: Tensor | None,
    before_BPC: Tensor | None,
) -> str:
    """Chooses the implementation of `rms_norm_silu`, and checks its shapes."""
    affine = {"weight": weight_C} | ({} if bias_C is None else {"bias": bias_C})
    _check_affine(x_BLC, **affine)
    if y_BLC is not None:
        _check_residual(x_BLC, y=y_BLC)
    if before_BPC is not None:
        check_shape("before", before_BPC, (x_BLC.shape[0], "P", x_BLC.shape[2]))
        check_same("before", before_BPC, "x", x_BLC)
    return _choose(impl, eps, x_BLC, **affine, y=y_BLC, before=before_BPC)


def _check_op(
    impl: str,
    x: Tensor,
    modulations: dict[str, Tensor | None],
    *,
    eps: float = 1.0,
    dout: Tensor | None = None,
    stats: Tensor | None = None,
    **residual: Tensor | None,
) -> None:
    """Raises ValueError for what an op does not take that is called without its function. The C++
    looks for itself."""
    if impl == "cpp":
        return
    check_modulation(x, **{name: m for name, m in modulations.items() if m is not None})
    _check_residual(x, **{name: t for name, t in residual.items() if t is not None})
    if dout is not None and stats is not None:
        check_shape("dout", dout, tuple(x.shape))
        check_shape("stats", stats, (*x.shape[:2], 2))
        if stats.dtype != torch.float32 or not stats.is_contiguous():
            raise ValueError(f"stats is {stats.dtype}, {stats.stride()}: must be dense float32")
    _choose(impl, eps, x, dout=dout, stats=stats, **residual, **modulations)


def _check_residual(x_BLC: Tensor, **residual: Tensor) -> None:
    check_shape("x", x_BLC, ("B", "L", "C"))
    for name, t in residual.items():
        check_shape(name, t, tuple(x_BLC.shape))
        check_same(name, t, "x", x_BLC)


def _check_affine(x_BLC: Tensor, **affine: Tensor) -> None:
    check_shape("x", x_BLC, ("B", "L", "C"))
    for name, t in affine.items():
        check_shape(name, t, (x_BLC.shape[-1],))
