"""The update of a flow-matching sampler, its noise, and the gradient of DMD."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sfkernels import reference
from sfkernels.arguments import (
    TOO_MANY,
    check_count,
    check_device,
    check_finite,
    check_floating,
    check_shape,
    check_tensor,
)
from sfkernels.dispatch import choose, contiguous_like, kernel, registered


class Noise(NamedTuple):
    """Noise that is drawn where it is used; `normal` says which. Tensors on the device, so that a
    replayed CUDA graph draws anew as they change.

    seed_B: int64 [B], a seed for each sample. frame_F: integers [F], the absolute index of each
    latent frame. draw: which of a frame's draws, 0 the initial noise, i that before step i.
    """

    seed_B: Tensor
    frame_F: Tensor
    draw: int


def normal(noise: Noise, shape: Sequence[int], *, impl: str = "auto") -> Tensor:
    """Standard normal noise of a shape [B, F, ...], float32: a function of seed, frame, draw and
    the element's place in its frame, whatever the batch, the chunk and the implementation (bits of
    the generator are equal, floats to rounding).

    Philox4x32-10 (Salmon et al., SC 2011) with key (seed's low word, high word) and counter
    (i, frame index, draw, 0), words of 32 bits, makes elements 4i to 4i + 3 of a frame: with
    u = (⌊word / 2⁹⌋ + 1/2) / 2²³, words (0, 1) give √(−2 ln u₀) · (cos 2πu₁, sin 2πu₁), words
    (2, 3) likewise. Raises ValueError for shapes that do not fit."""
    impl = _choose_normal(noise, shape, impl)
    if impl == "reference":
        return reference.normal(*noise, shape)
    return _normal(*noise, shape, impl)


def sampler_step(
    x: Tensor,
    flow: Tensor,
    sigma: Tensor,
    next_sigma: Tensor | None = None,
    noise: Tensor | Noise | None = None,
    *,
    uncond_flow: Tensor | None = None,
    guidance: float = 1.0,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """One step: flow → x0 → renoise. Returns (x0, x at next_sigma); without `next_sigma` the second
    is x0 too (the last step).

    x, flow, noise [B, F, ...] in x_t = (1 − σ)·x0 + σ·ε, flow = ε − x0, so x0 = x − σ·flow
    (arXiv 2506.08009, section 3.1). noise: a tensor, or a `Noise` to draw here. sigma, next_sigma:
    tensors on the device, a scalar, [B] or [B, F]. With `uncond_flow` the flow is
    uncond + guidance·(cond − uncond). Kernels read frames that are dense in memory where they are,
    others from a copy; they give gradients to x, flow and uncond_flow alone. Raises ValueError for
    shapes that do not fit or a next_sigma without noise."""
    given, drawn = (None, noise) if isinstance(noise, Noise) else (noise, None)
    impl = _choose_step(impl, x, flow, uncond_flow, sigma, next_sigma, guidance, given, drawn)
    if impl == "reference":
        if drawn is not None:
            given = reference.normal(*drawn, x.shape)
        return reference.sampler_step(x, flow, sigma, next_sigma, given, uncond_flow, guidance)
    drawing = (None, None, 0) if drawn is None else drawn
    x0, following = _sampler_step(
        x, flow, uncond_flow, sigma, next_sigma, given, *drawing, float(guidance), impl
    )
    return x0, x0 if next_sigma is None else following


def euler_step(
    x: Tensor,
    flow: Tensor,
    sigma: Tensor,
    next_sigma: Tensor,
    *,
    uncond_flow: Tensor | None = None,
    guidance: float = 1.0,
    impl: str = "auto",
) -> Tensor:
    """One step of a sampler of many: x + (σ_next − σ)·flow. The arguments, gradients and errors are
    those of `sampler_step`."""
    impl = _choose_step(impl, x, flow, uncond_flow, sigma, next_sigma, guidance, euler=True)
    if impl == "reference":
        return reference.euler_step(x, flow, sigma, next_sigma, uncond_flow, guidance)
    return _euler_step(x, flow, uncond_flow, sigma, next_sigma, float(guidance), impl)


@torch.no_grad()
def dmd_gradient(x: Tensor, real_x0: Tensor, fake_x0: Tensor, *, impl: str = "auto") -> Tensor:
    """The gradient of distribution matching: (fake_x0 − real_x0) / mean |x − real_x0|, the mean
    over all of a sample (arXiv 2405.14867, 2506.08009).

    x: what the generator made; real_x0, fake_x0: what the two score models make of it after
    noising; all [B, ...]. NaN becomes 0 and an infinity the largest number, as by
    `torch.nan_to_num`. Returns [B, ...] in x's dtype, without a graph: it is itself a gradient.
    Raises ValueError for shapes that do not fit."""
    impl = _choose_gradient(x, real_x0, fake_x0, impl)
    if impl == "reference":
        return reference.dmd_gradient(x, real_x0, fake_x0)
    return _dmd_gradient(x, real_x0, fake_x0, impl)


# The ops. A `Noise` is passed as its three parts.


@registered("normal")
def _normal(seed_B: Tensor, frame_F: Tensor, draw: int, shape: Sequence[int], impl: str) -> Tensor:
    if impl != "cpp":  # which looks for itself, as below
        _choose_normal(Noise(seed_B, frame_F, draw), shape, impl)
    out: Tensor = kernel(impl, "normal")(seed_B, frame_F, draw, shape)
    return out


@_normal.register_fake
def _(seed_B: Tensor, frame_F: Tensor, draw: int, shape: Sequence[int], impl: str) -> Tensor:
    return seed_B.new_empty(shape, dtype=torch.float32)


@registered("sampler_step")
def _sampler_step(
    x: Tensor,
    flow: Tensor,
    uncond_flow: Tensor | None,
    sigma: Tensor,
    next_sigma: Tensor | None,
    noise: Tensor | None,
    seed_B: Tensor | None,
    frame_F: Tensor | None,
    draw: int,
    guidance: float,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """x0, x_next (empty without a next_sigma)."""
    if impl != "cpp":
        drawn = None if seed_B is None or frame_F is None else Noise(seed_B, frame_F, draw)
        _choose_step(impl, x, flow, uncond_flow, sigma, next_sigma, guidance, noise, drawn)
    x0, following = kernel(impl, "sampler_step")(
        x, flow, uncond_flow, sigma, next_sigma, noise, seed_B, frame_F, draw, guidance, False
    )
    return x0, x.new_empty(0) if following is None else following


@_sampler_step.register_fake
def _(
    x: Tensor, flow: Tensor, uncond: Tensor | None, sigma: Tensor, next_sigma: Any, *_: Any
) -> tuple[Tensor, Tensor]:
    return contiguous_like(x), x.new_empty(0) if next_sigma is None else contiguous_like(x)


@registered("euler_step")
def _euler_step(
    x: Tensor,
    flow: Tensor,
    uncond_flow: Tensor | None,
    sigma: Tensor,
    next_sigma: Tensor,
    guidance: float,
    impl: str,
) -> Tensor:
    if impl != "cpp":
        _choose_step(impl, x, flow, uncond_flow, sigma, next_sigma, guidance, euler=True)
    following: Tensor = kernel(impl, "sampler_step")(
        x, flow, uncond_flow, sigma, next_sigma, None, None, None, 0, guidance, True
    )[1]
    return following


@registered("dmd_gradient")
def _dmd_gradient(x: Tensor, real_x0: Tensor, fake_x0: Tensor, impl: str) -> Tensor:
    if impl != "cpp":
        _choose_gradient(x, real_x0, fake_x0, impl)
    out: Tensor = kernel(impl, "dmd_gradient")(x, real_x0, fake_x0)
    return out


_euler_step.register_fake(contiguous_like)
_dmd_gradient.register_fake(contiguous_like)


# Steps are linear in x and the flows: their gradients are a factor per frame.


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    _, flow, uncond, sigma, next_sigma, *_, guidance, _ = inputs
    ctx.save_for_backward(sigma, next_sigma)
    ctx.guidance = None if uncond is None else guidance
    ctx.dtypes = flow.dtype, flow.dtype if uncond is None else uncond.dtype


def _sampler_step_backward(ctx: Any, dx0: Tensor, dnext: Tensor) -> Any:
    sigma, next_sigma = (_per_frame(s, dx0) for s in ctx.saved_tensors)
    dx = dx0.float() if next_sigma is None else dx0 + (1 - next_sigma) * dnext.float()
    return dx.to(dx0.dtype), *_flow_gradients(ctx, -sigma * dx), *[None] * 8


def _euler_step_backward(ctx: Any, dnext: Tensor) -> Any:
    sigma, next_sigma = (_per_frame(s, dnext) for s in ctx.saved_tensors)
    return dnext, *_flow_gradients(ctx, (next_sigma - sigma) * dnext.float()), *[None] * 4


def _flow_gradients(ctx: Any, dflow: Tensor) -> tuple[Tensor, Tensor | None]:
    """Gradients of flow and uncond_flow, from that of the guided one."""
    wanted, unwanted = ctx.dtypes
    if ctx.guidance is None:
        return dflow.to(wanted), None
    return (ctx.guidance * dflow).to(wanted), ((1 - ctx.guidance) * dflow).to(unwanted)


def _per_frame(sigma: Tensor | None, x: Tensor) -> Any:
    return None if sigma is None else reference.per_frame(sigma, x)


_sampler_step.register_autograd(_sampler_step_backward, setup_context=_setup)
_euler_step.register_autograd(_euler_step_backward, setup_context=_setup)


def _choose_step(
    impl: str,
    x: Tensor,
    flow: Tensor,
    uncond_flow: Tensor | None,
    sigma: Tensor,
    next_sigma: Tensor | None,
    guidance: float,
    given: Tensor | None = None,
    drawn: Noise | None = None,
    euler: bool = False,
) -> str:
    """The implementation to take. given, drawn: the noise, if there is one."""
    if not euler and (next_sigma is not None) != ((given is not None) != (drawn is not None)):
        raise ValueError(
            "next_sigma and noise belong together: give both, or neither at the last step"
        )
    tensors = dict(flow=flow, uncond_flow=uncond_flow, noise=given)
    _check_alike("B, F", x, **{k: t for k, t in tensors.items() if t is not None or k == "flow"})
    _check_elements(x.shape)
    if drawn is not None:
        _check_noise(drawn, x.shape, x.device)
    for name, s in (("sigma", sigma), ("next_sigma", next_sigma)):
        if s is None and name == "next_sigma" and not euler:
            continue
        check_tensor(name, s)
        assert s is not None
        if s.shape not in (x.shape[:0], x.shape[:1], x.shape[:2]):
            raise ValueError(
                f"{name} has shape {[*s.shape]}: must be [], [{x.shape[0]}] or {[*x.shape[:2]]}"
            )
        check_floating(name, s)
        check_device(name, s, x.device)
    check_finite("guidance", guidance)
    return choose("sampler_step", impl, x.device, x=x, **tensors)


def _choose_normal(noise: Noise, shape: Sequence[int], impl: str) -> str:
    if not isinstance(noise, Noise):
        raise ValueError(f"noise is a {type(noise).__name__}: must be a Noise")
    if not isinstance(shape, Sequence) or len(shape) < 2:
        raise ValueError(f"shape is {shape}: must be [B, F, ...]")
    for size in shape:
        check_count("a size of the noise", size, least=0)
    _check_elements(shape)
    check_tensor("seed_B", noise.seed_B)
    _check_noise(noise, shape, noise.seed_B.device)
    return choose("sampler_step", impl, noise.seed_B.device)


def _choose_gradient(x: Tensor, real_x0: Tensor, fake_x0: Tensor, impl: str) -> str:
    _check_alike("B", x, real_x0=real_x0, fake_x0=fake_x0)
    return choose("sampler_step", impl, x.device, x=x, real_x0=real_x0, fake_x0=fake_x0)


def _check_alike(sizes: str, x: Tensor, **others: Any) -> None:
    """Raises ValueError unless x is [sizes, ...] and the others have its shape and device."""
    check_tensor("x", x)
    if x.dim() < 2:
        raise ValueError(f"x has shape {[*x.shape]}: must be [{sizes}, ...]")
    check_floating("x", x)
    for name, other in others.items():
        check_shape(name, other, tuple(x.shape))
        check_floating(name, other)
        check_device(name, other, x.device)


def _check_elements(shape: Sequence[int]) -> None:
    """Raises ValueError where the noise's 32-bit counter cannot number a frame's groups of four."""
    check_count("elements of a frame", math.prod(shape[2:]), 0, TOO_MANY - 1)


def _check_noise(noise: Noise, shape: Sequence[int], device: torch.device) -> None:
    seed_B, frame_F, draw = noise
    check_shape("seed_B", seed_B, ("B",))
    check_shape("frame_F", frame_F, ("F",))
    if seed_B.shape != (shape[0],) or seed_B.dtype != torch.int64:
        raise ValueError(
            f"seed_B is {seed_B.dtype} {[*seed_B.shape]}: must be torch.int64 [{shape[0]}], a seed "
            "for each sample"
        )
    if frame_F.shape != (shape[1],) or frame_F.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"frame_F is {frame_F.dtype} {[*frame_F.shape]}: must be torch.int32 or torch.int64 "
            f"[{shape[1]}], the index of each frame"
        )
    check_count("draw", draw, 0, TOO_MANY - 1)
    for name, t in (("seed_B", seed_B), ("frame_F", frame_F)):
        check_device(name, t, device)
