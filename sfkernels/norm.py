"""Normalisation and modulation of a DiT block. Shapes are named as in reference.py."""

from __future__ import annotations

from torch import Tensor

from sfkernels.dispatch import check_same, check_shape, implementation


def layer_norm(
    x_BLC: Tensor, weight_C: Tensor, bias_C: Tensor, *, eps: float = 1e-6, impl: str = "auto"
) -> Tensor:
    """LayerNorm over the last dimension with weight and bias [C]; returns [B, L, C].
    Raises ValueError for shapes that do not fit."""
    check_shape("weight", weight_C, (x_BLC.shape[-1],))
    check_shape("bias", bias_C, (x_BLC.shape[-1],))
    return implementation("layer_norm", impl, x_BLC)(x_BLC, weight_C, bias_C, eps)


def adaln(
    x_BLC: Tensor, shift_BFC: Tensor, scale_BFC: Tensor, *, eps: float = 1e-6, impl: str = "auto"
) -> Tensor:
    """LayerNorm without affine, then `· (1 + scale) + shift` per latent frame (Wan2.1).

    x [B, L, C] with L a multiple of F; shift, scale [B or 1, F or 1, C], possibly strided views of
    a larger modulation and in a wider dtype. Returns [B, L, C] in x's dtype. Raises ValueError for
    shapes that do not fit."""
    _check_modulation(x_BLC, shift=shift_BFC, scale=scale_BFC)
    return implementation("adaln", impl, x_BLC)(x_BLC, shift_BFC, scale_BFC, eps)


def gated_residual(x_BLC: Tensor, y_BLC: Tensor, gate_BFC: Tensor, *, impl: str = "auto") -> Tensor:
    """`x + gate · y`, with a gate [B or 1, F or 1, C] per latent frame; x, y [B, L, C].
    Raises ValueError for shapes that do not fit."""
    _check_residual(x_BLC, y_BLC)
    _check_modulation(x_BLC, gate=gate_BFC)
    return implementation("gated_residual", impl, x_BLC)(x_BLC, y_BLC, gate_BFC)


def gated_adaln(
    x_BLC: Tensor,
    y_BLC: Tensor,
    gate_BFC: Tensor,
    shift_BFC: Tensor,
    scale_BFC: Tensor,
    *,
    eps: float = 1e-6,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The end of one residual branch and the start of the next: returns `x' = x + gate · y` and
    `adaln(x', shift, scale)`, both [B, L, C] in x's dtype.

    x, y [B, L, C]; gate, shift, scale [B or 1, F or 1, C]. Raises ValueError for shapes that do
    not fit."""
    _check_residual(x_BLC, y_BLC)
    _check_modulation(x_BLC, gate=gate_BFC, shift=shift_BFC, scale=scale_BFC)
    return implementation("gated_adaln", impl, x_BLC)(
        x_BLC, y_BLC, gate_BFC, shift_BFC, scale_BFC, eps
    )


def rms_norm(x_BLC: Tensor, weight_C: Tensor, *, eps: float = 1e-6, impl: str = "auto") -> Tensor:
    """`x / sqrt(mean(x²) + eps) · weight` over the last dimension; returns [B, L, C].
    Raises ValueError for shapes that do not fit."""
    check_shape("weight", weight_C, (x_BLC.shape[-1],))
    return implementation("rms_norm", impl, x_BLC)(x_BLC, weight_C, eps)


def _check_residual(x_BLC: Tensor, y_BLC: Tensor) -> None:
    check_shape("y", y_BLC, tuple(x_BLC.shape))
    check_same("y", y_BLC, "x", x_BLC)


def _check_modulation(x_BLC: Tensor, **modulation: Tensor) -> None:
    check_shape("x", x_BLC, ("B", "L", "C"))
    batch, tokens, channels = x_BLC.shape
    for name, m in modulation.items():
        fits = (
            m.dim() == 3
            and m.shape[0] in (1, batch)
            and tokens % m.shape[1] == 0
            and m.shape[2] == channels
        )
        if not fits:
            raise ValueError(
                f"{name} has shape {[*m.shape]}: must be [1 or {batch}, frames, {channels}] with "
                f"frames a divisor of the {tokens} tokens"
            )
        if m.device != x_BLC.device:
            raise ValueError(f"{name} is on {m.device}: must be on {x_BLC.device}, as x")
