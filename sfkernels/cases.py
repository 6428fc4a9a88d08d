"""Every launcher at real shapes, on meta tensors: what `sfkernels.check` compiles."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sfkernels import launch
from sfkernels.layout import BlockLayout

FEW = (80, 90)  # where forms are compiled that add little
TOKENS, FRAMES = 4680, 3  # one chunk of Wan2.1 at 480×832
# The frame slots that a thread looks up in a kernel that writes into a ring.
SLOTS = 4
# The mean and 1/σ of a row, stored by a forward pass and loaded by a backward pass, for each of up
# to four tiles in flight.
STATS = 8
# The scales of rows that a thread stores.
SCALES = 4
# The bounds of tiles and spans, and of each row of a tile in the tensor cores' layout the logarithm
# of its sum and what is subtracted from it.
LSE = 80
# The sigmas, seed, frame index or partial sums that a thread of the sampler's kernels loads.
SCALARS = 6


@dataclass(frozen=True)
class Case:
    """One call of a launcher. narrow: how many global loads, and how many stores, of less than 128
    bits its kernels over activations may have in their code. archs: where it is compiled.
    may_spill: registers may spill. may_serialise: the softmax may wait for the products before it.
    """

    launcher: str
    name: str
    call: Callable[[], Any]
    narrow: int = 0
    archs: tuple[int, ...] = launch.ARCHITECTURES
    may_spill: bool = False
    may_serialise: bool = False


def cases() -> list[Case]:
    """Every launcher of sfkernels.gpu in every form that the public functions use."""
    found: list[Case] = []
    for size, channels, heads in (("1.3B", 1536, 12), ("14B", 5120, 40)):
        found += _norms(size, channels, torch.bfloat16)
        found += _ropes(size, channels, heads, torch.bfloat16)
        found += _quantised(size, channels, torch.bfloat16)
    wide = [*_norms("1.3B", 1536, torch.float32), *_ropes("1.3B", 1536, 12, torch.float32)]
    wide += _quantised("1.3B", 1536, torch.float32)
    for dtype, head_dim in ((torch.bfloat16, 128), (torch.float16, 64)):
        found += _attention(12, head_dim, dtype)
        found += _attention(12, head_dim, dtype, hopper=True)
    wide += _attention(12, 128, torch.float32)
    found += [dataclasses.replace(case, archs=FEW) for case in wide]
    for channels in (96, 192, 384):
        found += _silus(channels)
    found += _samplers(torch.float32)
    gpu = importlib.import_module("sfkernels.gpu")
    found.append(
        Case(
            "rope_table",
            "3 x 30 x 52",
            lambda: gpu.rope_table(_new(FRAMES, dtype=torch.int64), (30, 52), 128, 10_000.0),
        )
    )
    return found


def _norms(size: str, channels: int, dtype: torch.dtype) -> Iterator[Case]:
    gpu = importlib.import_module("sfkernels.gpu")
    x = _new(1, TOKENS, channels, dtype=dtype)
    modulation = _new(1, FRAMES, 6, channels, dtype=torch.float32)
    shift, scale, gate = modulation.unbind(2)[:3]
    weight = _new(1, 1, channels, dtype=dtype)
    stats = _new(1, TOKENS, 2, dtype=torch.float32)
    # name: y, gate, scale, shift, centred, plus_one
    forms: dict[str, tuple[Tensor | None, Tensor | None, Tensor, Tensor | None, bool, bool]] = {
        "adaln": (None, None, scale, shift, True, True),
        "gated_adaln": (x, gate, scale, shift, True, True),
    }
    heaviest = [*forms]
    if dtype == torch.bfloat16:
        forms |= {
            "layer_norm": (None, None, weight, weight, True, False),
            "rms_norm": (None, None, weight, None, False, False),
            "gated_layer_norm": (x, gate, weight, weight, True, False),
        }
    if dtype == torch.bfloat16 and size == "1.3B":
        forms |= {
            "gated_adaln, no gate": (x, None, scale, shift, True, True),
            "gated_layer_norm, no gate": (x, None, weight, weight, True, False),
        }
    for form, (y, g, *affine, centred, plus_one) in forms.items():
        name = f"{form} {size} {_short(dtype)}"
        yield Case(
            "norm_fwd",
            name,
            functools.partial(gpu.norm_fwd, x, y, g, *affine, 1e-6, centred, plus_one),
            narrow=STATS,
            archs=launch.ARCHITECTURES if form in heaviest else FEW,
        )
        into = None if y is None else x
        kept = None if g is None else y
        yield Case(
            "norm_bwd",
            name,
            functools.partial(gpu.norm_bwd, into, x, x, kept, g, *affine, stats, centred, plus_one),
            narrow=STATS,
            archs=launch.ARCHITECTURES if form in heaviest else FEW,
        )


def _silus(channels: int) -> Iterator[Case]:
    """Of the decoder of Wan2.1's VAE: a chunk of four frames and the two before it."""
    gpu = importlib.import_module("sfkernels.gpu")
    x = _new(1, 4 * TOKENS, channels, dtype=torch.bfloat16)
    before = _new(1, 2 * TOKENS, channels, dtype=torch.bfloat16)
    weight = _new(1, 1, channels, dtype=torch.bfloat16)
    stats = _new(1, 4 * TOKENS, 2, dtype=torch.float32)
    rest = None, weight, None
    for form, y in (("rms_norm_silu", None), ("rms_norm_silu, residual", x)):
        name = f"{form} {channels}"
        options = {"silu": True, "bias_C": weight[0, 0], "before_BPC": before}
        forward = functools.partial(gpu.norm_fwd, x, y, *rest, 1e-6, False, False, **options)
        args = y, x, x, None, *rest, stats, False, False
        backward = functools.partial(gpu.norm_bwd, *args, silu=True)
        archs = launch.ARCHITECTURES if channels == 96 else FEW
        yield Case("norm_fwd", name, forward, narrow=STATS, archs=archs)
        yield Case("norm_bwd", name, backward, narrow=STATS, archs=archs)


def _ropes(size: str, channels: int, heads: int, dtype: torch.dtype) -> Iterator[Case]:
    gpu = importlib.import_module("sfkernels.gpu")
    head_dim = channels // heads
    qkv = _new(1, TOKENS, 3 * channels, dtype=dtype)
    weight = _new(channels, dtype=dtype)
    table = _new(TOKENS, head_dim // 2, 2, dtype=torch.float32)
    ring = _new(1, 7 * TOKENS, heads, head_dim, dtype=dtype)
    stats = _new(1, TOKENS, 2, dtype=torch.float32)
    slot = _new(FRAMES, dtype=torch.int64)
    grad = _new(1, TOKENS, heads, head_dim, dtype=dtype)
    args = (qkv, weight, weight, table)
    name = f"{size} {_short(dtype)}"
    yield Case(
        "qk_norm_rope_fwd",
        f"new tensors {name}",
        lambda: gpu.qk_norm_rope_fwd(*args, None, None, None, 1e-6),
        narrow=STATS,
    )
    yield Case(
        "qk_norm_rope_fwd",
        f"into a ring {name}",
        lambda: gpu.qk_norm_rope_fwd(*args, ring, ring, slot, 1e-6),
        narrow=SLOTS,
    )
    yield Case(
        "qk_norm_rope_bwd",
        name,
        lambda: gpu.qk_norm_rope_bwd(grad, grad, grad, *args, stats),
        narrow=STATS,
    )


def _quantised(size: str, channels: int, dtype: torch.dtype) -> Iterator[Case]:
    gpu = importlib.import_module("sfkernels.gpu")
    x = _new(1, TOKENS, channels, dtype=dtype)
    for into, said in ((torch.int8, "int8"), (torch.float8_e4m3fn, "e4m3")):
        call = functools.partial(gpu.quantize_rows, x, into)
        yield Case("quantize_rows", f"{said} {size} {_short(dtype)}", call, narrow=SCALES)


def _attention(
    heads: int, head_dim: int, dtype: torch.dtype, hopper: bool = False
) -> Iterator[Case]:
    """hopper: the same in Gluon."""
    gpu = importlib.import_module("sfkernels.gpu.hopper" if hopper else "sfkernels.gpu")
    layout = BlockLayout.causal(2 * FRAMES, FRAMES, TOKENS // FRAMES, teacher_forcing=True)
    rows, prefix = layout.rows, ((0, TOKENS),)
    q = _new(1, layout.tokens, heads, head_dim, dtype=dtype)
    lse = _new(1, heads, layout.tokens, dtype=torch.float32)
    chunk, ring = q[:, :TOKENS], _new(1, 7 * TOKENS, heads, head_dim, dtype=dtype)
    valid = _new(dtype=torch.int32)
    name = f"{heads} x {head_dim} {_short(dtype)}"
    calls: dict[str, dict[str, Callable[[], Any]]] = {
        "attention_fwd": {
            name: lambda: gpu.attention_fwd(q, q, q, rows, None, None, (), 0.1),
            f"{name}, prefix": lambda: gpu.attention_fwd(q, q, q, rows, ring, ring, prefix, 0.1),
        },
        "attention_bwd": {
            name: lambda: gpu.attention_bwd(q, q, q, q, q, lse, rows, None, None, (), 0.1),
            f"{name}, prefix": lambda: gpu.attention_bwd(
                q, q, q, q, q, lse, rows, ring, ring, prefix, 0.1
            ),
        },
        "ring_attention": {
            name: lambda: gpu.ring_attention(chunk, ring, ring, valid, 0.1),
        },
    }
    if not hopper:
        calls["combine_parts"] = {
            name: lambda: gpu.combine_parts(
                _new(2, *chunk.shape, dtype=torch.float32), lse.expand(2, -1, -1, -1), dtype
            ),
        }
        calls["row_delta"] = {name: lambda: gpu.row_delta(chunk, chunk)}
        table = _new(7 * TOKENS, head_dim // 2, 2, dtype=torch.float32)
        calls["rotate_ring"] = {name: lambda: gpu.rotate_ring(ring, table, valid)}
    for launcher, forms in calls.items():
        for form, call in forms.items():
            archs = FEW if "prefix" in form else launch.ARCHITECTURES
            yield Case(
                f"hopper.{launcher}" if hopper else launcher,
                form,
                call,
                narrow=LSE,
                archs=(90,) if hopper else archs,
                may_spill=dtype == torch.float32,  # which only tests use
                # Of short heads under a pattern ptxas leaves products and softmax apart.
                may_serialise=head_dim == 64 and not hopper,
            )


def _samplers(dtype: torch.dtype) -> Iterator[Case]:
    gpu = importlib.import_module("sfkernels.gpu")
    x = _new(1, FRAMES, 16, 60, 104, dtype=dtype)
    clip = _new(1, 21, 16, 60, 104, dtype=dtype)
    sigma = _new(dtype=torch.float32)
    seed, frame = _new(1, dtype=torch.int64), _new(FRAMES, dtype=torch.int64)
    # name: uncond_flow, next_sigma, noise, seed, frame, guidance, euler
    forms: dict[str, tuple[Any, ...]] = {
        "last": (None, None, None, None, None, 1.0, False),
        "given noise": (None, sigma, x, None, None, 1.0, False),
        "drawn noise": (None, sigma, None, seed, frame, 1.0, False),
        "drawn noise, guided": (x, sigma, None, seed, frame, 5.0, False),
        "euler, guided": (x, sigma, None, None, None, 5.0, True),
    }
    for name, (uncond, after, noise, s, f, guidance, euler) in forms.items():
        drawn = (noise, s, f, 1, guidance, euler)
        call = functools.partial(gpu.sampler_step, x, x, uncond, sigma, after, *drawn)
        yield Case("sampler_step", name, call, narrow=SCALARS)
    yield Case("normal", "a chunk", lambda: gpu.normal(seed, frame, 0, x.shape), narrow=SCALARS)
    yield Case(
        "dmd_gradient", "21 frames", lambda: gpu.dmd_gradient(clip, clip, clip), narrow=SCALARS
    )


def _new(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _short(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
