"""What `python -m bench tune` times: every kernel at the sizes of Wan2.1."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sfkernels import launch, roofline
from sfkernels.layout import BlockLayout

FRAME = 1560  # tokens


@dataclass(frozen=True)
class Work:
    """One size of a kernel. run: the launcher on one set of tensors, returning what it wrote.
    flops: of a kernel that multiplies matrices, whose bytes do not tell."""

    said: str
    nbytes: int
    make: Callable[[torch.device], list[Tensor]]
    run: Callable[..., Any]
    flops: int = 0


@dataclass(frozen=True)
class Search:
    """A kernel's setting for a number of channels (1 for elementwise kernels, for attention the
    bytes of a head's row)."""

    kernel: str
    channels: int
    works: tuple[Work, ...]


# Of the video decoder, by channels: frames and pixels of a frame in a chunk.
LEVELS = {96: (12, 480 * 832), 192: (12, 240 * 416), 384: (6, 120 * 208)}
EPS = 1e-6


def searches(device: torch.device, channels: Sequence[int] = (1536, 5120)) -> Iterator[Search]:
    """The most valuable first: what runs most often per frame."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for kernel, works in _attention_works(256).items():
        if launch.architecture(device) == 90 or not kernel.startswith("hopper"):
            yield Search(kernel, 256, works)
    for count in channels:
        for kernel, works in _row_works(count, dtype).items():
            yield Search(kernel, count, works)
    for count in LEVELS:
        for kernel, works in _decoder_works(count, dtype).items():
            yield Search(kernel, count, works)
    yield Search("sampler", 1, (_sampler_work(),))


def _attention_works(head_bytes: int) -> dict[str, tuple[Work, ...]]:
    """A stream's chunk and frame over a full window, and a causal clip of 9 frames."""
    heads, head_dim, window = 12, head_bytes // 2, 21 * FRAME
    layout = BlockLayout.causal(9, 3, FRAME)
    size = 2  # bytes of an element

    def new(count: int, tokens: int, device: torch.device) -> list[Tensor]:
        made = torch.randn(count, 1, tokens, heads, head_dim, device=device)
        return [*made.to(torch.bfloat16)]

    def ring(tokens: int, device: torch.device) -> list[Tensor]:
        valid = torch.tensor(window, dtype=torch.int32, device=device)
        return [*new(1, tokens, device), *new(2, window, device), valid]

    def clip(device: torch.device) -> list[Tensor]:
        """do, q, k, v, o; with an lse that leaves small probabilities."""
        lse = torch.full((1, heads, layout.tokens), 20.0, device=device)
        return [*new(5, layout.tokens, device), lse]

    def stream(module: str, *t: Tensor) -> Any:
        return kernels(module, "ring_attention")(*t, head_dim**-0.5)

    def backward(module: str, *t: Tensor) -> Any:
        launcher = kernels(module, "attention_bwd")
        return launcher(*t, layout.rows, None, None, (), head_dim**-0.5)

    def kernels(module: str, launcher: str) -> Callable[..., Any]:
        found: Callable[..., Any] = getattr(importlib.import_module(module), launcher)
        return found

    works: dict[str, tuple[Work, ...]] = {}
    for prefix, module in (("attention", "sfkernels.gpu"), ("hopper", "sfkernels.gpu.hopper")):
        works[f"{prefix}_fwd"] = tuple(
            Work(
                f"{tokens} queries of {window} keys",
                roofline.attention_bytes(tokens, window, heads, head_dim, size),
                functools.partial(ring, tokens),
                functools.partial(stream, module),
                roofline.attention_flops(tokens * window, heads, head_dim),
            )
            for tokens in (3 * FRAME, FRAME)
        )
        both = Work(
            f"backward of {layout.tokens} tokens",
            roofline.norm_bytes(
                layout.tokens, heads * head_dim, 8, size
            ),  # q, k, v, o and gradients
            clip,
            functools.partial(backward, module),
            roofline.attention_flops(layout.pairs, heads, head_dim, backward=True),
        )
        works |= {f"{prefix}_dkdv": (both,), f"{prefix}_dq": (both,)}
    return works


def _row_works(channels: int, dtype: torch.dtype) -> dict[str, tuple[Work, ...]]:
    gpu = importlib.import_module("sfkernels.gpu")
    heads, head_dim = channels // 128, 128

    def x(tokens: int, device: torch.device, wide: int = 1) -> Tensor:
        return torch.randn(1, tokens, wide * channels, device=device).to(dtype)

    def rows(frames: int, device: torch.device) -> list[Tensor]:
        return [x(frames * FRAME, device)]

    def norm(frames: int, device: torch.device) -> list[Tensor]:
        return [x(frames * FRAME, device), x(1, device)]

    def adaln(frames: int, device: torch.device) -> list[Tensor]:
        modulation = torch.randn(1, frames, 2, channels, device=device)
        return [x(frames * FRAME, device), *modulation.unbind(2)]

    def residual(frames: int, device: torch.device) -> list[Tensor]:
        modulation = torch.randn(1, frames, 3, channels, device=device)
        both = [x(frames * FRAME, device) for _ in range(2)]
        return [*both, *modulation.unbind(2)]

    def backward(make: Any, grads: int, frames: int, device: torch.device) -> list[Tensor]:
        """The gradients of the outputs, the inputs, the statistics of rows."""
        stats = torch.randn(1, frames * FRAME, 2, device=device)
        return [*(x(frames * FRAME, device) for _ in range(grads)), *make(frames, device), stats]

    def rope(frames: int, device: torch.device) -> list[Tensor]:
        weights = torch.randn(2, channels, device=device).to(dtype)
        table = torch.randn(frames * FRAME, head_dim // 2, 2, device=device)
        return [x(frames * FRAME, device, 3), *weights, table]

    def rope_bwd(frames: int, device: torch.device) -> list[Tensor]:
        grads = [x(frames * FRAME, device).unflatten(-1, (heads, head_dim)) for _ in range(3)]
        return [*grads, *rope(frames, device), torch.randn(1, frames * FRAME, 2, device=device)]

    def norm_fwd(x: Tensor, weight: Tensor) -> Any:
        return gpu.norm_fwd(x, None, None, weight, None, EPS, False, False)

    def norm_bwd(dout: Tensor, x: Tensor, weight: Tensor, stats: Tensor) -> Any:
        return gpu.norm_bwd(None, dout, x, None, None, weight, None, stats, False, False)

    def adaln_fwd(x: Tensor, *modulation: Tensor) -> Any:
        return gpu.norm_fwd(x, None, None, *modulation, EPS, True, True)

    def adaln_bwd(dout: Tensor, x: Tensor, *rest: Tensor) -> Any:
        return gpu.norm_bwd(None, dout, x, None, None, *rest, True, True)

    def residual_fwd(*t: Tensor) -> Any:
        return gpu.norm_fwd(*t, EPS, True, True)

    def residual_bwd(*t: Tensor) -> Any:
        return gpu.norm_bwd(*t, True, True)

    def qk_fwd(*t: Tensor) -> Any:
        return gpu.qk_norm_rope_fwd(*t, None, None, None, EPS)

    def qk_bwd(*t: Tensor) -> Any:
        return gpu.qk_norm_rope_bwd(*t)

    def quantised(x: Tensor) -> Any:
        return gpu.quantize_rows(x, torch.int8)

    def bwd(make: Any, grads: int) -> Any:
        return functools.partial(backward, make, grads)

    def at_sizes(make: Any, run: Callable[..., Any], tensors: int) -> tuple[Work, ...]:
        return tuple(
            Work(
                f"{frames * FRAME} x {channels}",
                roofline.norm_bytes(frames * FRAME, channels, tensors, dtype.itemsize),
                functools.partial(make, frames),
                run,
            )
            for frames in (3, 21)
        )

    quantise = tuple(
        Work(
            f"{frames * FRAME} x {channels}",
            roofline.quantize_bytes(frames * FRAME, channels, dtype.itemsize),
            functools.partial(rows, frames),
            quantised,
        )
        for frames in (3, 21)
    )
    return {
        "residual_norm_fwd": at_sizes(residual, residual_fwd, 4),
        "qk_norm_rope_fwd": at_sizes(rope, qk_fwd, 6),
        "norm_fwd": at_sizes(norm, norm_fwd, 2),
        "residual_norm_bwd": at_sizes(bwd(residual, 2), residual_bwd, 6),
        "qk_norm_rope_bwd": at_sizes(rope_bwd, qk_bwd, 8),
        "norm_bwd": at_sizes(bwd(norm, 1), norm_bwd, 3),
        "adaln_fwd": at_sizes(adaln, adaln_fwd, 2),
        "adaln_bwd": at_sizes(bwd(adaln, 1), adaln_bwd, 3),
        "quantize_rows": quantise,
    }


def _decoder_works(channels: int, dtype: torch.dtype) -> dict[str, tuple[Work, ...]]:
    """What precedes a convolution of the video decoder, with a residual and behind the two frames
    before; none for channels that it has not."""
    if channels not in LEVELS:
        return {}
    gpu = importlib.import_module("sfkernels.gpu")
    frames, pixels = LEVELS[channels]
    tokens, before = frames * pixels, 2 * pixels

    def rows(device: torch.device, *counts: int) -> list[Tensor]:
        return [torch.randn(1, n, channels, device=device).to(dtype) for n in counts]

    def forward(device: torch.device) -> list[Tensor]:
        return rows(device, tokens, tokens, 1, before)

    def backward(device: torch.device) -> list[Tensor]:
        stats = torch.randn(1, tokens, 2, device=device)
        return [*rows(device, tokens, before + tokens, tokens, 1), stats]

    def fwd(x: Tensor, y: Tensor, weight: Tensor, before: Tensor) -> Any:
        options = EPS, False, False, True
        return gpu.norm_fwd(x, y, None, weight, None, *options, before_BPC=before)

    def bwd(dresidual: Tensor, dout: Tensor, x: Tensor, weight: Tensor, stats: Tensor) -> Any:
        options = stats, False, False, True
        return gpu.norm_bwd(dresidual, dout[:, before:], x, None, None, weight, None, *options)

    def work(make: Callable[[torch.device], list[Tensor]], run: Any, back: bool) -> Work:
        nbytes = roofline.norm_silu_bytes(tokens, before, channels, dtype.itemsize, back)
        return Work(f"{tokens} x {channels}", nbytes, make, run)

    return {
        "norm_silu_fwd": (work(forward, fwd, False),),
        "norm_silu_bwd": (work(backward, bwd, True),),
    }


def _sampler_work() -> Work:
    gpu = importlib.import_module("sfkernels.gpu")

    def make(device: torch.device) -> list[Tensor]:
        x = torch.randn(2, 1, 3, 16, 60, 104, device=device)
        sigmas = torch.tensor([0.9, 0.6], device=device)
        return [*x, *sigmas, torch.tensor([7], device=device), torch.arange(3, device=device)]

    def run(
        x: Tensor, flow: Tensor, sigma: Tensor, after: Tensor, seed: Tensor, frame: Tensor
    ) -> Any:
        return gpu.sampler_step(x, flow, None, sigma, after, None, seed, frame, 1, 1.0, False)

    return Work("3 frames of latents", roofline.sampler_bytes(3 * 16 * 60 * 104, 4), make, run)


def works(channels: int) -> dict[str, tuple[Work, ...]]:
    """Of every kernel with a setting for so many channels, or bytes of a head's row."""
    rows = _row_works(channels, torch.bfloat16) | _decoder_works(channels, torch.bfloat16)
    return _attention_works(channels) | rows
