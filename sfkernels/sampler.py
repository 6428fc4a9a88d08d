"""The update of a few-step flow-matching sampler."""

from __future__ import annotations

from torch import Tensor

from sfkernels.dispatch import check_shape, implementation


def sampler_step(
    x: Tensor,
    flow: Tensor,
    sigma: Tensor,
    next_sigma: Tensor | None = None,
    noise: Tensor | None = None,
    *,
    uncond_flow: Tensor | None = None,
    guidance: float = 1.0,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """One step: flow → x0 → renoise. Returns (x0, x at next_sigma); without `next_sigma` the second
    is x0 too (the last step).

    x, flow, noise [B, F, ...] in x_t = (1 − σ)·x0 + σ·ε, flow = ε − x0, so x0 = x − σ·flow
    (arXiv 2506.08009, section 3.1). sigma, next_sigma: tensors on the device, a scalar, [B] or
    [B, F]. With `uncond_flow` the flow is uncond + guidance·(cond − uncond). Raises ValueError for
    shapes that do not fit or a next_sigma without noise."""
    for name, other in (("flow", flow), ("noise", noise), ("uncond_flow", uncond_flow)):
        if other is not None:
            check_shape(name, other, tuple(x.shape))
    if (next_sigma is None) != (noise is None):
        raise ValueError(
            "next_sigma and noise belong together: give both, or neither at the last step"
        )
    for name, s in (("sigma", sigma), ("next_sigma", next_sigma)):
        if s is not None and s.shape not in (x.shape[:0], x.shape[:1], x.shape[:2]):
            raise ValueError(
                f"{name} has shape {[*s.shape]}: must be [], [{x.shape[0]}] or {[*x.shape[:2]]}"
            )
    return implementation("sampler_step", impl, x)(
        x, flow, sigma, next_sigma, noise, uncond_flow, guidance
    )
