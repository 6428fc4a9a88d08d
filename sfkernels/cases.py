"""Registry of the ops' calls on tensors of real shapes. From it come the lists of what is compiled
ahead of time (bounds.py), and of what the bench compares, times, tunes and runs under a sanitizer.

Shapes: B batch (1 here), L tokens or queries, S keys, H heads, D head dim, C channels.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sfkernels import attention, convolution, norm, quant, residual, roofline, rope, sampler
from sfkernels.layout import BlockLayout, Row
from sfkernels.linear import linear as linear_layer

GRID = (30, 52)  # tokens of a frame of Wan2.1 at 480×832
FRAME = GRID[0] * GRID[1]
CHUNK = 3  # latent frames
WINDOW = 21  # latent frames of a ring, and of a clip
LATENTS = (16, 60, 104)  # channels, height and width of a latent frame
CONTEXT_FRAMES = 2  # frames that a convolution of the video decoder sees before its own
# The convolutions over time of a chunk in that decoder, by their output: frames, height, width,
# channels in and out, taps. Without those that are matrix products, and the last one, to colours.
CONVOLUTIONS = (
    (12, 480, 832, 96, 96, (3, 3, 3)),
    (12, 240, 416, 192, 192, (3, 3, 3)),
    (6, 120, 208, 384, 384, (3, 3, 3)),
    (3, 60, 104, 384, 384, (3, 3, 3)),
    (6, 120, 208, 192, 384, (3, 3, 3)),
    (3, 60, 104, 16, 384, (3, 3, 3)),
    (6, 120, 208, 384, 768, (3, 1, 1)),
    (3, 60, 104, 384, 768, (3, 1, 1)),
)
# Those after its upsamplings, by their input: frames, height, width, channels in and out.
UPSAMPLED = ((6, 60, 104, 384, 192), (12, 120, 208, 384, 192), (12, 240, 416, 192, 96))

Make = Callable[[torch.device], list[Tensor]]


@dataclass(frozen=True)
class Case:
    """One call of a public function, or its backward pass.

    op, size: its name. function: of (*tensors, impl=...), returns a tensor or a tuple of them.
    make: new tensors on a device, which may be "meta". flops, nbytes: needed, whoever computes it;
    each tensor counts once for each time that it has to be read or written."""

    op: str
    size: str
    function: Callable[..., Any]
    make: Make
    flops: int
    nbytes: int
    backward: bool = False

    @property
    def label(self) -> str:
        return f"{self.op}{' backward' if self.backward else ''} {self.size}"

    def by(self, impl: str, **options: Any) -> Callable[..., tuple[Tensor, ...]]:
        """The function under an implementation, its outputs as a tuple."""
        return functools.partial(_sequence, functools.partial(self.function, impl=impl, **options))

    def launch(self, impl: str, device: torch.device) -> tuple[Tensor, ...]:
        """Outputs or, of a backward pass, gradients by random ones, of new tensors. On "meta" the
        launches reach `launch.recorder`, of a backward pass its own alone."""
        tensors = self.make(device)
        if not self.backward:
            with torch.no_grad():
                return self.by(impl)(*tensors)
        leaves = [t.requires_grad_() for t in tensors if t.is_floating_point()]
        outs = self.by(impl)(*tensors)
        upstream = [torch.randn_like(out) for out in outs]
        grads = torch.autograd.grad(outs, leaves, upstream, allow_unused=True)
        return tuple(grad for grad in grads if grad is not None)


@dataclass(frozen=True)
class AttentionCase(Case):
    """Attention. rows: keys that each of the queries sees, of those in `plain`: q, k and v of the
    same attention for implementations without ring and prefix. own: how many keys, the last ones,
    take a gradient. layout: the pattern where not all queries see all keys of `plain`."""

    rows: tuple[Row, ...] = ()
    own: int = 0
    plain: Callable[..., tuple[Tensor, Tensor, Tensor]] = lambda q, k, v, *_: (q, k, v)
    layout: BlockLayout | None = None

    @property
    def label(self) -> str:
        return f"{self.op}, {self.size}{', backward' if self.backward else ''}"


def _sequence(function: Callable[..., Any], *tensors: Tensor) -> tuple[Tensor, ...]:
    out = function(*tensors)
    return (out,) if isinstance(out, Tensor) else tuple(out)


# Norms, RoPE, the sampler and rows in 8 bits, whose time is that of the bytes they move.

# By op: activations read and written, forward and backward.
NORMS = {
    "adaln": (2, 3),
    "gated_adaln": (4, 6),
    "gated_layer_norm": (4, 6),
    "gated_residual": (3, 3),
    "layer_norm": (2, 3),
    "rms_norm": (2, 3),
}


def normalisation(
    op: str, frames: int, frame_tokens: int, channels: int, dtype: torch.dtype,
    backward: bool = False, gate: bool = True,
) -> Case:  # fmt: skip
    """A norm of a DiT block. gate: of a residual connection, where the op has one."""
    tokens = frames * frame_tokens
    function = getattr(residual if op == "gated_residual" else norm, op)

    def make(device: torch.device) -> list[Tensor]:
        x, y = (torch.randn(1, tokens, channels, device=device).to(dtype) for _ in range(2))
        modulation = torch.randn(1, frames, 3, channels, device=device).unbind(2)
        affine = torch.randn(2, channels, device=device).to(dtype).unbind()
        streams = [x, y, *modulation[: int(gate)]] if op.startswith("gated") else [x]
        if op.endswith("adaln"):
            return [*streams, *modulation[1:]]
        return [*streams, *affine[: {"rms_norm": 1, "gated_residual": 0}.get(op, 2)]]

    def without_gate(x: Tensor, y: Tensor, *rest: Tensor, impl: str) -> Any:
        return function(x, y, None, *rest, impl=impl)

    flops = roofline.row_flops(op, tokens * channels, backward)
    nbytes = roofline.norm_bytes(tokens, channels, NORMS[op][backward], dtype.itemsize)
    call, name = (function, op) if gate else (without_gate, f"{op}, no gate")
    return Case(name, f"{tokens} x {channels}", call, make, flops, nbytes, backward)


def rms_norm_silu(
    frames: int, pixels: int, channels: int, dtype: torch.dtype,
    backward: bool = False, residual: bool = True, bias: bool = True,
) -> Case:  # fmt: skip
    """RMSNorm and SiLU before a convolution of the video decoder, with the residual, the frames
    that come before and, forward, the bias of the convolution before."""
    tokens, before = frames * pixels, CONTEXT_FRAMES * pixels
    bias = bias and not backward

    def make(device: torch.device) -> list[Tensor]:
        shapes = [(1, tokens, channels), (channels,), (1, before, channels)]
        shapes += [(1, tokens, channels)] * residual + [(channels,)] * bias
        return [torch.randn(shape, device=device).to(dtype) for shape in shapes]

    def function(x: Tensor, weight: Tensor, before: Tensor, *rest: Tensor, impl: str) -> Any:
        y = rest[0] if residual else None
        bias_C = rest[-1] if bias else None
        outs = norm.rms_norm_silu(x, weight, y, bias_C=bias_C, before_BPC=before, impl=impl)
        return outs if residual else outs[1]

    flops = roofline.row_flops("rms_norm_silu", tokens * channels, backward)
    nbytes = roofline.norm_silu_bytes(tokens, before, channels, dtype.itemsize, backward)
    name = "rms_norm_silu" if residual else "rms_norm_silu, no residual"
    return Case(name, f"{tokens} x {channels}", function, make, flops, nbytes, backward)


def qk_norm_rope(
    frames: int, frame_tokens: int, channels: int, head_dim: int, dtype: torch.dtype,
    backward: bool = False, append: int = 0, per_head: bool = False,
) -> Case:  # fmt: skip
    """QK-norm and RoPE. append: frames of a ring to write keys and values into, 0 for new
    tensors. per_head: whether each head has a norm of its own."""
    tokens, heads = frames * frame_tokens, channels // head_dim

    def make(device: torch.device) -> list[Tensor]:
        qkv = torch.randn(1, tokens, 3 * channels, device=device).to(dtype)
        weights = torch.randn(2, head_dim if per_head else channels, device=device).to(dtype)
        frame = torch.arange(frames, device=device)
        table = rope.rope_table(frame, (1, frame_tokens), head_dim, impl="reference")
        if not append:
            return [qkv, *weights, table]
        ring = torch.zeros(2, 1, append * frame_tokens, heads, head_dim, device=device).to(dtype)
        return [qkv, *weights, table, *ring, frame + min(2, append - frames)]

    def new(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, table: Tensor, impl: str) -> Any:
        return rope.qk_norm_rope(qkv, q_weight, k_weight, table.detach(), impl=impl)

    def into_ring(*tensors: Tensor, impl: str) -> tuple[Tensor, ...]:
        """The rings are returned too, to be compared."""
        return rope.qk_norm_rope_append(*tensors, impl=impl), *tensors[4:6]

    flops = roofline.row_flops("qk_norm_rope", tokens * channels, backward)
    nbytes = roofline.qk_norm_rope_bytes(tokens, channels, head_dim, dtype.itemsize, backward)
    call, name = (into_ring, "qk_norm_rope_append") if append else (new, "qk_norm_rope")
    name += ", norms of heads" * per_head
    return Case(name, f"{tokens} x {channels}", call, make, flops, nbytes, backward)


def quantize_rows(tokens: int, channels: int, dtype: torch.dtype, into: torch.dtype) -> Case:
    def make(device: torch.device) -> list[Tensor]:
        return [torch.randn(1, tokens, channels, device=device).to(dtype)]

    flops = roofline.row_flops("quantize_rows", tokens * channels)
    nbytes = roofline.quantize_bytes(tokens, channels, dtype.itemsize)
    function = functools.partial(quant.quantize_rows, dtype=into)
    name = f"quantize_rows, {'int8' if into == torch.int8 else 'e4m3'}"
    return Case(name, f"{tokens} x {channels}", function, make, flops, nbytes)


def linear(tokens: int, channels: int, outputs: int, gelu: bool, dtype: torch.dtype) -> Case:
    def make(device: torch.device) -> list[Tensor]:
        x = torch.randn(1, tokens, channels, device=device)
        weight = torch.randn(outputs, channels, device=device) * channels**-0.5
        return [t.to(dtype) for t in (x, weight, torch.randn(outputs, device=device))]

    flops = 2 * tokens * channels * outputs
    nbytes = roofline.linear_bytes(tokens, channels, outputs, dtype.itemsize)
    function = functools.partial(linear_layer, gelu=gelu)
    name = "linear + GELU" if gelu else "linear"
    return Case(name, f"{tokens} x {channels} to {outputs}", function, make, flops, nbytes)


# By form of the sampler: the latents it takes beside x and the flow, and the tensors it moves.
SAMPLERS = {
    "last": ((), 3),
    "given noise": (("noise",), 5),
    "drawn noise": ((), 4),
    "drawn noise, guided": (("uncond",), 5),
    "euler, guided": (("uncond",), 4),
}


def sampler_step(form: str, frames: int = CHUNK, latents: Sequence[int] = LATENTS) -> Case:
    shape = (1, frames, *latents)
    more, moved = SAMPLERS[form]

    def make(device: torch.device) -> list[Tensor]:
        given = torch.randn(2 + len(more), *shape, device=device)
        sigmas = torch.full((2,), 0.9, device=device) - 0.3 * torch.arange(2, device=device)
        seed = torch.full((1,), 7, device=device)
        return [*given, *sigmas, seed, torch.arange(frames, device=device)]

    def function(*tensors: Tensor, impl: str) -> Any:
        x, flow, *rest, sigma, after, seed, frame = tensors
        options: dict[str, Any] = {"impl": impl}
        if "uncond" in more:
            options |= {"uncond_flow": rest[0], "guidance": 5.0}
        if form.startswith("euler"):
            return sampler.euler_step(x, flow, sigma, after, **options)
        if form == "last":
            return sampler.sampler_step(x, flow, sigma, **options)
        noise = rest[0] if "noise" in more else sampler.Noise(seed, frame, 1)
        return sampler.sampler_step(x, flow, sigma, after, noise, **options)

    elements = torch.Size(shape).numel()
    flops, nbytes = (
        roofline.row_flops("sampler_step", elements),
        roofline.sampler_bytes(elements, moved),
    )
    return Case(f"sampler_step, {form}", _times(shape), function, make, flops, nbytes)


def normal(frames: int = CHUNK, latents: Sequence[int] = LATENTS) -> Case:
    shape = (1, frames, *latents)

    def make(device: torch.device) -> list[Tensor]:
        return [torch.full((1,), 7, device=device), torch.arange(frames, device=device)]

    def function(seed: Tensor, frame: Tensor, impl: str) -> Tensor:
        return sampler.normal(sampler.Noise(seed, frame, 0), shape, impl=impl)

    return Case("normal", _times(shape), function, make, 0, 4 * torch.Size(shape).numel())


def dmd_gradient(frames: int = WINDOW, latents: Sequence[int] = LATENTS) -> Case:
    shape = (1, frames, *latents)
    elements = torch.Size(shape).numel()

    def make(device: torch.device) -> list[Tensor]:
        return [*torch.randn(3, *shape, device=device)]

    flops, nbytes = (
        roofline.row_flops("dmd_gradient", elements),
        roofline.sampler_bytes(elements, 4),
    )
    return Case("dmd_gradient", _times(shape), sampler.dmd_gradient, make, flops, nbytes)


def rope_table(frames: int = CHUNK, grid: tuple[int, int] = GRID, head_dim: int = 128) -> Case:
    tokens = frames * grid[0] * grid[1]

    def function(frame: Tensor, impl: str) -> Tensor:
        return rope.rope_table(frame, grid, head_dim, impl=impl)

    def make(device: torch.device) -> list[Tensor]:
        return [torch.arange(frames, device=device) + 100]

    flops = roofline.row_flops("rope_table", tokens * head_dim)
    nbytes = roofline.rope_table_bytes(tokens, head_dim)
    return Case("rope_table", f"{tokens} x {head_dim}", function, make, flops, nbytes)


def causal_conv3d(
    frames: int, height: int, width: int, inputs: int, outputs: int, taps: tuple[int, int, int],
    dtype: torch.dtype,
) -> Case:  # fmt: skip
    """A convolution of the video decoder that makes so many frames, its weights channels-last."""
    seen, made = ((frames + more) * height * width for more in (taps[0] - 1, 0))

    def make(device: torch.device) -> list[Tensor]:
        x = torch.randn(1, frames + taps[0] - 1, height, width, inputs, device=device)
        weight = torch.randn(outputs, inputs, *taps, device=device) / inputs**0.5
        bias = torch.randn(outputs, device=device)
        weight = weight.contiguous(memory_format=torch.channels_last_3d)
        return [x.to(dtype), weight.to(dtype), bias.to(dtype)]

    count = math.prod(taps)
    flops = roofline.convolution_flops(made, inputs, outputs, count)
    nbytes = roofline.convolution_bytes(seen, made, inputs, outputs, count, dtype.itemsize)
    size = f"{frames}x{height}x{width}, {inputs} to {outputs}, {'x'.join(map(str, taps))}"
    return Case("causal_conv3d", size, convolution.causal_conv3d, make, flops, nbytes)


def upsampled_conv2d(
    frames: int, height: int, width: int, inputs: int, outputs: int, dtype: torch.dtype
) -> Case:
    pixels = frames * height * width

    def make(device: torch.device) -> list[Tensor]:
        x = torch.randn(1, frames, height, width, inputs, device=device)
        weight = torch.randn(2, 2, outputs, 2, 2, inputs, device=device) / inputs**0.5
        bias = torch.randn(outputs, device=device)
        return [x.to(dtype), weight.movedim(-1, 3).to(dtype), bias.to(dtype)]

    flops = roofline.convolution_flops(4 * pixels, inputs, outputs, 4)
    nbytes = roofline.convolution_bytes(pixels, 4 * pixels, inputs, outputs, 16, dtype.itemsize)
    size = f"{frames}x{height}x{width}, {inputs} to {outputs}"
    return Case("upsampled_conv2d", size, convolution.upsampled_conv2d, make, flops, nbytes)


def _times(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape[1:]))


# Attention, whose time is that of its products.


@dataclass(frozen=True)
class Heads:
    """Tokens of a frame, and the heads that each token has."""

    frame_tokens: int = FRAME
    heads: int = 12
    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16

    def new(self, tokens: int, device: torch.device) -> Tensor:
        return torch.randn(1, tokens, self.heads, self.head_dim, device=device).to(self.dtype)

    def flops(self, pairs: int, backward: bool = False, no_gradient: int = 0) -> int:
        return roofline.attention_flops(pairs, self.heads, self.head_dim, backward, no_gradient)

    def nbytes(self, queries: int, keys: int) -> int:
        size = self.dtype.itemsize
        return roofline.attention_bytes(queries, keys, self.heads, self.head_dim, size)


def ring_attention(
    of: Heads, frames: int, capacity: int, valid: int | None = None, table: bool = False
) -> AttentionCase:
    """A chunk of `frames` frames over a ring of `capacity`, of which `valid` (None: all) hold keys.
    table: these are rotated as they are read."""
    held = capacity if valid is None else valid
    queries, slots, count = (n * of.frame_tokens for n in (frames, capacity, held))

    def make(device: torch.device) -> list[Tensor]:
        filled = torch.full((), count, dtype=torch.int32, device=device)
        tensors = [of.new(queries, device), *(of.new(slots, device) for _ in range(2)), filled]
        return [*tensors, *[torch.randn(slots, of.head_dim // 2, 2, device=device)] * table]

    def function(
        q: Tensor, k: Tensor, v: Tensor, valid: Tensor, table: Tensor | None = None, *, impl: str
    ) -> Tensor:
        full = count == slots
        return attention.ring_attention(q, k, v, valid, full=full, k_table_SP2=table, impl=impl)

    size = f"{queries} queries, ring of {capacity} frame{'s' if capacity > 1 else ''}"
    size += "" if valid is None else f", {valid} valid"
    return AttentionCase(
        "attention",
        size + (", rotated" if table else ""),
        function,
        make,
        of.flops(queries * count),
        of.nbytes(queries, count),
        rows=(Row((0, queries), ((0, count),)),),
        own=count,
        plain=lambda q, k, v, *_: (q, k[:, :count], v[:, :count]),
    )


def cross_attention(of: Heads, queries: int, keys: int, what: str = "text") -> AttentionCase:
    return AttentionCase(
        "attention",
        f"{queries} queries, {what} of {keys}",
        attention.cross_attention,
        lambda device: [of.new(n, device) for n in (queries, keys, keys)],
        of.flops(queries * keys),
        of.nbytes(queries, keys),
        rows=(Row((0, queries), ((0, keys),)),),
        own=keys,
    )


def training(
    of: Heads, frames: int, backward: bool = False, teacher_forcing: bool = False,
    window: int | None = None, sink: int = 0, deterministic: bool = False,
) -> AttentionCase:  # fmt: skip
    """A training pass under a layout of chunks of three frames."""
    layout = BlockLayout.causal(
        frames, CHUNK, of.frame_tokens, window=window, sink=sink, teacher_forcing=teacher_forcing
    )

    def function(
        q: Tensor, k: Tensor, v: Tensor, impl: str, deterministic: bool = deterministic
    ) -> Tensor:
        return attention.block_causal_attention(
            q, k, v, layout, deterministic=deterministic, impl=impl
        )

    forcing = "teacher" if teacher_forcing else "diffusion"
    moving = "" if window is None else f", window {window}, sink {sink}"
    moving += ", deterministic" * deterministic
    return AttentionCase(
        "attention",
        f"{forcing} forcing, {frames} frames{moving}",
        function,
        lambda device: [of.new(layout.tokens, device) for _ in range(3)],
        of.flops(layout.pairs, backward),
        of.nbytes(layout.tokens, layout.tokens),
        backward,
        rows=layout.rows,
        own=layout.tokens,
        layout=layout,
    )


def self_forcing(of: Heads, frames: int, backward: bool = False) -> AttentionCase:
    """A chunk at the end of a clip of `frames` frames, the others of which are a prefix."""
    past, queries = (n * of.frame_tokens for n in (frames - CHUNK, CHUNK))
    layout = BlockLayout((CHUNK,), of.frame_tokens)

    def make(device: torch.device) -> list[Tensor]:
        """q, k, v, the prefix, and for who knows none its concatenation with k and v, which so
        costs nothing."""
        q, k, v = (of.new(queries, device) for _ in range(3))
        k_past, v_past = (of.new(past, device) for _ in range(2))
        return [q, k, v, k_past, v_past, torch.cat([k_past, k], 1), torch.cat([v_past, v], 1)]

    def function(
        q: Tensor, k: Tensor, v: Tensor, k_past: Tensor, v_past: Tensor, *_: Tensor, impl: str
    ) -> Tensor:
        prefix = attention.Prefix(k_past, v_past)
        return attention.block_causal_attention(q, k, v, layout, prefix=prefix, impl=impl)

    keys = past + queries
    return AttentionCase(
        "attention",
        f"self forcing, {CHUNK} frames after {frames - CHUNK}",
        function,
        make,
        of.flops(queries * keys, backward, no_gradient=queries * past),
        of.nbytes(queries, keys),
        backward,
        rows=(Row((0, queries), ((0, keys),)),),
        own=queries,
        plain=lambda *tensors: (tensors[0], tensors[5], tensors[6]),
    )
