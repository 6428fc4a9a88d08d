"""What a stream and a training iteration must cost on a GPU, from arithmetic alone, for any
resolution, window, chunk and number of steps. `python -m bench predict` shows it.

Every formula for FLOPs and bytes of the benches lives here. A multiply-add is two FLOPs; a tensor
counts once for each time that it has to be read or written. "Floor" is FLOPs over the attainable
rate of matrix products or bytes over that of a copy, whichever takes longer, summed over the
components: no launch gaps, no exponentials, no decoder's bytes. "Whole waves" also counts the
multiprocessors that idle in the last wave of tiles. All of it is predicted, none of it measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sfmodel.config import DiTConfig, Preset

VAE_STRIDE = 8  # pixels of a latent, each way
PIXEL_FRAMES = 4  # of a latent frame; the very first one makes a single one
CLIP = 21  # latent frames of the clips that Wan2.1 is trained on: 81 pixel frames
TILE = 128  # rows, and columns, of one multiprocessor's share of a matrix product
MOST_SPLITS = 8  # of the keys of attention

# --- FLOPs and bytes of ops


def attention_flops(
    pairs: int, heads: int, head_dim: int, backward: bool = False, no_gradient: int = 0
) -> int:
    """FLOPs needed for (query, key) pairs that meet: forward two products; backward five, and
    three for the `no_gradient` pairs whose keys take none."""
    products = 5 * pairs - 2 * no_gradient if backward else 2 * pairs
    return 2 * head_dim * heads * products


def attention_bytes(queries: int, keys: int, heads: int, head_dim: int, size: int) -> int:
    """Of q, k, v and o, with elements of `size` bytes."""
    return 2 * (queries + keys) * heads * head_dim * size


def norm_bytes(rows: int, channels: int, tensors: int, size: int) -> int:
    """Of `tensors` activations [rows, channels] with elements of `size` bytes. Modulations and
    weights are a thousandth of that and left out."""
    return rows * channels * tensors * size


def norm_silu_bytes(
    rows: int, before: int, channels: int, size: int, backward: bool = False
) -> int:
    """Of what precedes a convolution of the VAE, with its residual: x, y read, their sum and the
    output written, which begins with a copy of `before` rows; backward both gradients and the sum
    read, one gradient written, and those rows are there already."""
    copied = 0 if backward else norm_bytes(before, channels, 2, size)
    return norm_bytes(rows, channels, 4, size) + copied


def quantize_bytes(rows: int, channels: int, size: int) -> int:
    """Of rows in 8 bits: elements of `size` bytes read, one byte each and a scale a row written."""
    return norm_bytes(rows, channels, 1, size + 1) + 4 * rows


def rope_table_bytes(tokens: int, head_dim: int) -> int:
    """Of a cosine and a sine in float32 for each pair of a head's channels."""
    return tokens * head_dim * 4


def qk_norm_rope_bytes(
    tokens: int, channels: int, head_dim: int, size: int, backward: bool = False
) -> int:
    """Of QK-norm and RoPE, with or without the append to a ring, and the table: q, k and v read
    and written; backward dq, dk, dv, q and k read, the three gradients written."""
    tensors = 8 if backward else 6
    return norm_bytes(tokens, channels, tensors, size) + rope_table_bytes(tokens, head_dim)


def sampler_bytes(elements: int, tensors: int) -> int:
    """Of float32 latents. A sampler step reads x and the flow and writes x0 and the next x: four
    tensors where the noise is drawn in the kernel, five where it is given. The DMD gradient reads
    three and writes one."""
    return 4 * tensors * elements


# Floating-point operations for each element of the output (of one of q, k and v for RoPE), counted
# by hand from reference.py. Exponentials, roots and the drawing of noise are left out.
PER_ELEMENT = {
    "rms_norm": 4,  # square, sum, two products
    "rms_norm_silu": 9,  # residual and bias before it; 1 + exp, quotient, product
    "layer_norm": 7,  # two sums, difference, square, two products, shift
    "adaln": 7,
    "gated_layer_norm": 9,  # gate and residual before it
    "gated_adaln": 9,
    "qk_norm_rope": 14,  # of q and of k: the RMSNorm's four, two products and a sum
    "sampler_step": 5,  # x - σ·flow, (1 - σ')·x0 + σ'·ε
    "dmd_gradient": 5,  # two differences, a magnitude, its sum, the quotient
    "quantize_rows": 4,  # a magnitude, the largest, a product, its rounding
    "rope_table": 1,  # the angle
}


def row_flops(op: str, elements: int, backward: bool = False) -> int:
    """FLOPs of an op whose time is that of its bytes; backward about twice as many."""
    return PER_ELEMENT[op] * elements * (2 if backward else 1)


def convolution_flops(pixels: int, channels_in: int, channels_out: int, taps: int) -> int:
    """`pixels` of the output, in all frames; taps: of the kernel, 27 for 3×3×3."""
    return 2 * pixels * channels_in * channels_out * taps


# --- The diffusion transformer


def linears(config: DiTConfig) -> list[tuple[str, int, int, int]]:
    """(name, how often in a pass, channels in, channels out) of all matrix products whose rows are
    tokens. The prompt's keys and values are computed once a prompt and the modulation has one row
    a frame: neither counts."""
    d, ends = config.dim, math.prod(config.patch) * config.channels
    return [
        ("q, k, v", config.layers, d, 3 * d),
        ("attention's output, cross-attention's q and output", 3 * config.layers, d, d),
        ("FFN's first", config.layers, d, config.ffn_dim),
        ("FFN's second", config.layers, config.ffn_dim, d),
        ("patch embedding", 1, ends, d),
        ("head", 1, d, ends),
    ]


def pass_parts(config: DiTConfig, tokens: int, pairs: int) -> tuple[int, int, int]:
    """FLOPs of one forward pass in linears, self-attention and cross-attention."""
    products = sum(count * a * b for _, count, a, b in linears(config))
    attended = [
        config.layers * attention_flops(p, config.heads, config.head_dim)
        for p in (pairs, tokens * config.text_len)
    ]
    return 2 * tokens * products, attended[0], attended[1]


def pass_flops(config: DiTConfig, tokens: int, pairs: int) -> int:
    """One forward pass over `tokens` tokens of which `pairs` (query, key) pairs attend to each
    other; the prompt's keys and values are cached. Matrix products and attention only."""
    return sum(pass_parts(config, tokens, pairs))


def causal_pairs(chunks: Sequence[int], frame_tokens: int) -> int:
    """(query, key) pairs where each chunk sees itself and all before it; chunks in frames.
    `BlockLayout.pairs` without a window, and half of it under teacher forcing: there a clean chunk
    and its noisy twin see equally many."""
    return frame_tokens**2 * sum(c * sum(chunks[: i + 1]) for i, c in enumerate(chunks))


def rolling_flops(
    config: DiTConfig, frame_tokens: int, window: int, chunk: int, steps: int
) -> dict[str, int]:
    """One chunk of a stream whose window is full, by each way of `extrapolate.py`."""
    n = frame_tokens
    context = window - chunk

    def cached(frames: int, seen: int) -> int:
        return pass_flops(config, frames * n, frames * n * seen * n)

    prefill = [cached(chunk, seen) for seen in range(chunk, context + 1, chunk)]
    whole = pass_flops(config, window * n, causal_pairs((context, chunk), n))
    return {
        "recompute window": steps * whole,
        "recompute cache": sum(prefill) + steps * cached(chunk, window),
        "ring cache": (steps + 1) * cached(chunk, window),
    }


def parameters(config: DiTConfig) -> int:
    """Weights and biases of the model."""
    d, ends = config.dim, math.prod(config.patch) * config.channels
    attention = 4 * (d * d + d) + 2 * d  # q, k, v, o; the two QK-norms
    ffn = 2 * d * config.ffn_dim + config.ffn_dim + d
    layer = 2 * attention + ffn + 2 * d + 6 * d  # cross-attention's norm, modulation
    text = config.text_dim * d + d + d * d + d
    time = config.freq_dim * d + d + d * d + d + 6 * d * d + 6 * d
    return config.layers * layer + text + time + (ends + 1) * d + (d + 1) * ends + 2 * d


def memory_gib(preset: Preset, batch: int = 1, precision: str = "bf16") -> dict[str, float]:
    """GiB of the transformer's weights and of the keys and values in the cache, the prompt's
    included: one byte an element in 8-bit, else two. Activations, decoder, text encoder and
    PyTorch's own are left out."""
    config, size = preset.dit, 1 if precision == "8-bit" else 2
    rows = preset.window * math.prod(preset.grid) + config.text_len
    weights = parameters(config) * size / 2**30
    cache = 2 * config.layers * batch * rows * config.dim * size / 2**30
    return {"weights": weights, "cache": cache, "total": weights + cache}


# --- Decoders: (count, channels in, channels out, taps, times the latents' height and width, times
# their frames) of each convolution, by its output.

# Wan2.1's VAE (dim 96, multiples 1, 2, 4, 4, two and one residual blocks a stage). The 2× up-
# samplings in space halve the channels; those in time double them first and deal them to frames.
# The convolution after an up-sampling counts all its nine taps, unless it is "folded": as four 2×2
# kernels of what is not upsampled it needs four.
WAN_DECODER = (
    (1, 16, 16, 1, 1, 1),
    (1, 16, 384, 27, 1, 1),
    (10, 384, 384, 27, 1, 1),  # two residual blocks of the middle, three of the first stage
    (1, 384, 4 * 384, 1, 1, 1),  # the middle's attention: q, k, v and output
    (1, 384, 768, 3, 1, 1),
    (1, 384, 192, 9, 2, 2),
    (1, 192, 384, 27, 2, 2),
    (1, 192, 384, 1, 2, 2),
    (5, 384, 384, 27, 2, 2),
    (1, 384, 768, 3, 2, 2),
    (1, 384, 192, 9, 4, 4),
    (6, 192, 192, 27, 4, 4),
    (1, 192, 96, 9, 8, 4),
    (6, 96, 96, 27, 8, 4),
    (1, 96, 3, 27, 8, 4),
)
# Of the encoder, by the same measures: four pixel frames make a latent one. Each 2× down-sampling
# in space is a convolution of nine taps, in time one of three.
WAN_ENCODER = (
    (1, 3, 96, 27, 8, 4),
    (4, 96, 96, 27, 8, 4),
    (1, 96, 96, 9, 4, 4),
    (1, 96, 192, 27, 4, 4),
    (1, 96, 192, 1, 4, 4),
    (3, 192, 192, 27, 4, 4),
    (1, 192, 192, 9, 2, 4),
    (1, 192, 192, 3, 2, 2),
    (1, 192, 384, 27, 2, 2),
    (1, 192, 384, 1, 2, 2),
    (3, 384, 384, 27, 2, 2),
    (1, 384, 384, 9, 1, 2),
    (1, 384, 384, 3, 1, 1),
    (8, 384, 384, 27, 1, 1),  # two residual blocks of the last stage, two of the middle
    (1, 384, 4 * 384, 1, 1, 1),
    (1, 384, 32, 27, 1, 1),
    (1, 32, 32, 1, 1, 1),
)
# TAEHV (taew2_1), a distilled one: three blocks a stage, each of three 3×3 convolutions of which
# the first takes its input beside that of the frame before.
TAEHV_DECODER = (
    (1, 16, 256, 9, 1, 1),
    (3, 2 * 256, 256, 9, 1, 1),
    (6, 256, 256, 9, 1, 1),
    (1, 256, 256, 1, 2, 1),
    (1, 256, 128, 9, 2, 1),
    (3, 2 * 128, 128, 9, 2, 1),
    (6, 128, 128, 9, 2, 1),
    (1, 128, 256, 1, 4, 1),  # makes two frames of one
    (1, 128, 64, 9, 4, 2),
    (3, 2 * 64, 64, 9, 4, 2),
    (6, 64, 64, 9, 4, 2),
    (1, 64, 128, 1, 8, 2),  # and again
    (1, 64, 64, 9, 8, 4),
    (1, 64, 3, 9, 8, 4),
)
DECODERS = {"wan": WAN_DECODER, "taehv": TAEHV_DECODER, "none": ()}


def decode_flops(
    decoder: str,
    frames: int,
    height: int,
    width: int,
    first: bool = False,
    folded: bool = False,
    dim: int = 96,
) -> int:
    """Of `frames` latent frames of height × width latents. first: they begin the video; Wan's VAE
    then makes 1 + 4·(frames − 1) pixel frames, while TAEHV decodes them all and drops three.
    folded: of Wan's VAE with four of nine taps after each up-sampling. dim: its channels at full
    resolution."""
    if decoder != "wan":
        dim, first, folded = 96, False, False
    flops = _vae_attention_flops(frames, height * width, dim) if decoder == "wan" else 0
    for count, a, b, taps, space, times in DECODERS[decoder]:
        # The convolutions that make two frames of one have three taps and skip the first frame.
        made = times * frames - (times if taps == 3 else times - 1) * first
        taps = 4 if folded and taps == 9 else taps
        a, b = _widened(a, dim), _widened(b, dim)
        flops += count * convolution_flops(made * height * width * space**2, a, b, taps)
    return flops


def encode_flops(frames: int, height: int, width: int, dim: int = 96) -> int:
    """Of 4 · frames pixel frames after a video's first one, to `frames` latent frames of height ×
    width by Wan's VAE."""
    flops = _vae_attention_flops(frames, height * width, dim)
    for count, a, b, taps, space, times in WAN_ENCODER:
        made = times * frames * height * width * space**2
        a, b = _widened(a, dim), _widened(b, dim)
        flops += count * convolution_flops(made, a, b, taps)
    return flops


def _widened(channels: int, dim: int) -> int:
    """Of the tables above, which are for a dim of 96: its multiples change with it."""
    return channels if channels % 96 else channels * dim // 96


def _vae_attention_flops(frames: int, latents: int, dim: int) -> int:
    """Inside each latent frame, one head."""
    return attention_flops(frames * latents**2, 1, 4 * dim)


# --- Machines


@dataclass(frozen=True)
class Gpu:
    """matmul_tflops, copy_tbps: attainable TFLOP/s of bf16 matrix products and TB/s of a copy,
    bytes read and written. eight_bit: rate of 8-bit matrix products over that of bf16. memory_gib:
    about what the driver reports. link_gbps: GB/s to another GPU, one direction, by NVLink or else
    PCIe. source: of the two rates."""

    name: str
    multiprocessors: int
    matmul_tflops: float
    copy_tbps: float
    memory_gib: float
    link_gbps: float
    eight_bit: float = 2.0
    source: str = "rates given"


# Measured on an H200, whose data sheet says 989 dense bf16 TFLOP/s and 4.8 TB/s.
MATMUL_SHARE, COPY_SHARE = 790 / 989, 4.3 / 4.8
LINK_SHARE = 0.8  # assumed on every GPU, measured on none
# By data sheet: multiprocessors, dense bf16 TFLOP/s with fp32 sums, TB/s, GiB, GB/s to a neighbour
# one way. The 8-bit rate is twice that of bf16 on all of them: fp8 or int8, on an A100 int8 alone,
# so that there P and V are taken to be int8 too.
SHEETS = {
    "h200": ("H200 SXM", 132, 989, 4.8, 140, 450),
    "h100": ("H100 SXM", 132, 989, 3.35, 79, 450),
    "a100": ("A100 SXM 80 GB", 108, 312, 2.039, 80, 300),
    "b200": ("B200", 148, 2250, 8.0, 179, 900),
    "l40s": ("L40S", 142, 362, 0.864, 45, 32),
    "rtx4090": ("RTX 4090", 128, 165.2, 1.008, 24, 32),
}
GPUS = {
    key: Gpu(
        name,
        multiprocessors,
        tflops * MATMUL_SHARE,
        tbps * COPY_SHARE,
        gib,
        link * LINK_SHARE,
        source="measured" if key == "h200" else "data sheet × the H200's share of its data sheet",
    )
    for key, (name, multiprocessors, tflops, tbps, gib, link) in SHEETS.items()
}


def waves(
    rows: int, columns: float, multiprocessors: int, tile: int = TILE, split: int = 1
) -> float:
    """Share of the multiprocessors' time in whole waves that is spent on useful tiles, one tile a
    multiprocessor at a time. columns: tiles side by side; the heads of attention, channels out /
    128 of a linear. split: parts of the keys, each a tile of its own."""
    tiles = math.ceil(rows / tile) * math.ceil(columns) * split
    useful = rows / tile * columns * split
    return useful / (math.ceil(tiles / multiprocessors) * multiprocessors)


def best_split(rows: int, heads: int, multiprocessors: int) -> int:
    """Of the keys of attention: the smallest one that fills its waves best. The merging of the
    parts is not counted."""
    splits = range(1, MOST_SPLITS + 1)
    return max(splits, key=lambda s: waves(rows, heads, multiprocessors, split=s))


# --- Times. A row is a component: its TFLOP, GB and milliseconds.

Row = dict[str, float]
TIMES = ("floor_ms", "whole_waves_ms")


def _row(gpu: Gpu, precision: str, flops: float, nbytes: float, share: float = 1.0) -> Row:
    """share: of the multiprocessors' time that the waves of the arithmetic fill."""
    rate = gpu.matmul_tflops * (gpu.eight_bit if precision == "8-bit" else 1)
    arithmetic, copied = flops / rate / 1e9, nbytes / gpu.copy_tbps / 1e9
    return {
        "tflop": flops / 1e12,
        "gb": nbytes / 1e9,
        "floor_ms": max(arithmetic, copied),
        "whole_waves_ms": max(arithmetic / share, copied),
    }


def total(rows: Iterable[Row]) -> Row:
    rows = [*rows]
    return {key: sum(row[key] for row in rows) for key in ("tflop", "gb", *TIMES)}


def dit(
    preset: Preset, gpu: Gpu, visible: int, precision: str = "bf16", passes: int | None = None
) -> dict[str, Row]:
    """The components of `passes` forward passes over a chunk that sees `visible` latent frames,
    its own included. None: all of a chunk, its steps and the pass that writes its clean keys and
    values."""
    passes = len(preset.steps) + 1 if passes is None else passes
    config, n, sms = preset.dit, math.prod(preset.grid), gpu.multiprocessors
    tokens, keys, d, heads = preset.chunk * n, visible * n, config.dim, config.heads
    size = 1 if precision == "8-bit" else 2  # of operands; outputs have two bytes in both

    products, attended, crossed = (passes * x for x in pass_parts(config, tokens, tokens * keys))
    operands = waved = 0.0
    for _, count, a, b in linears(config):
        operands += passes * count * ((tokens + b) * a * size + tokens * b * 2)
        waved += passes * count * 2 * tokens * a * b / waves(tokens, b / TILE, sms)
    split = best_split(tokens, heads, sms)

    def qkvo(keys: int) -> int:
        nbytes = attention_bytes(tokens, keys, heads, config.head_dim, size)
        return passes * config.layers * (nbytes + (2 - size) * tokens * d)

    # Two gated AdaLN and the gated norm of cross-attention read and write two activations each.
    # That of cross-attention's query is free: the factor of its row commutes with the product and
    # its weight folds into the keys. In 8-bit the three normed outputs and q, k, v are one byte.
    pointwise = 3 * norm_bytes(tokens, d, 4, 2) + qk_norm_rope_bytes(tokens, d, config.head_dim, 2)
    pointwise -= (2 - size) * 6 * tokens * d
    return {
        "self-attention": _row(
            gpu, precision, attended, qkvo(keys), waves(tokens, heads, sms, split=split)
        ),
        "linears": _row(gpu, precision, products, operands, products / waved),
        "cross-attention": _row(gpu, precision, crossed, qkvo(config.text_len)),
        "norms, RoPE": _row(gpu, precision, 0, passes * config.layers * pointwise),
    }


def decode(
    preset: Preset, gpu: Gpu, precision: str = "bf16", decoder: str = "wan", first: bool = False
) -> Row:
    """A chunk's latents to pixels, by arithmetic alone. TAEHV stays in 16 bits: its channels are
    too few to gain from less."""
    flops = decode_flops(decoder, preset.chunk, preset.height, preset.width, first)
    return _row(gpu, "bf16" if decoder == "taehv" else precision, flops, 0)


def clip_chunks(preset: Preset) -> tuple[int, ...]:
    """Latent frames of each chunk of a clip, as many whole chunks as it holds."""
    return (preset.chunk,) * max(1, CLIP // preset.chunk)


def fps(preset: Preset, gpu: Gpu, windows: Sequence[int], precision: str, decoder: str) -> Row:
    """Pixel frames a second, the mean over chunks that see `windows` frames; decode included."""
    rows = [row for seen in windows for row in dit(preset, gpu, seen, precision).values()]
    rows += [decode(preset, gpu, precision, decoder)] * len(windows)
    frames = PIXEL_FRAMES * preset.chunk * len(windows)
    return {key.removesuffix("_ms"): 1e3 * frames / total(rows)[key] for key in TIMES}


def latency_ms(preset: Preset, gpu: Gpu, precision: str, decoder: str) -> dict[str, Row]:
    """first_frame: the first chunk's steps, which see it alone, and its decode. reaction: the same
    of a chunk in a full window, which is how long a new prompt or control takes to be seen."""
    first = replace(preset, chunk=preset.first or preset.chunk)
    out = {}
    for name, one, seen in (
        ("first_frame", first, first.chunk),
        ("reaction", preset, preset.window),
    ):
        rows = dit(one, gpu, seen, precision, len(preset.steps)).values()
        decoded = decode(one, gpu, precision, decoder, first=name == "first_frame")
        both = total([*rows, decoded])
        out[name] = {key.removesuffix("_ms"): both[key] for key in TIMES}
    return out


# --- Training


def training_flops(
    preset: Preset, real_score: DiTConfig | None = None, exit_step: float | None = None
) -> dict[str, float]:
    """FLOPs of one iteration, batch 1, on a clip of 21 frames (or the whole chunks in it), with
    full checkpointing: forward, recompute, and a backward of twice the linears' FLOPs and 2.5
    times the attention's. Self Forcing (arXiv 2506.08009): `exit_step` steps without gradient (the
    mean of 0 … steps − 1 if None), the exit step, and the cache's pass without gradient. The
    generator's loss takes two passes of the real score (guidance) and one of the fake one. The
    gradients of a prefix's keys and values, which self forcing does not need, are counted.

    real_score: the same sizes as the generator if None. Raises ValueError for an exit step that
    does not exist."""
    config, n, steps = preset.dit, math.prod(preset.grid), len(preset.steps)
    before = (steps - 1) / 2 if exit_step is None else exit_step
    if not 0 <= before <= steps - 1:
        raise ValueError(f"exit_step={exit_step}: must be from 0 to {steps - 1}")
    chunks = clip_chunks(preset)
    tokens, causal = n * sum(chunks), causal_pairs(chunks, n)

    def with_gradient(pairs: int) -> float:
        products, attended, crossed = pass_parts(config, tokens, pairs)
        return 4 * products + 4.5 * (attended + crossed)

    forward = pass_flops(config, tokens, causal)
    real, fake = (pass_flops(c, tokens, tokens**2) for c in (real_score or config, config))
    return {
        "diffusion forcing": with_gradient(causal),
        # Twice the tokens and twice the pairs, [clean ‖ noisy].
        "teacher forcing": 2 * with_gradient(causal),
        "self forcing, generator": (
            (before + 1) * forward + with_gradient(causal) + 2 * real + fake
        ),
        "self forcing, critic": (before + 2) * forward + with_gradient(tokens**2),
    }


# --- Several GPUs


def exchange_bytes(preset: Preset, gpus: int, precision: str = "bf16") -> float:
    """Bytes that each GPU sends (and receives) in one layer of one pass of a chunk, under sequence
    parallelism by all-to-all over heads (DeepSpeed-Ulysses, arXiv 2309.14509).

    A GPU holds 1/n of the chunk's tokens outside attention and 1/n of the heads inside it. On the
    way in it keeps 1/n of its q, k and v and sends the rest, (n − 1)/n of tokens/n · dim elements
    each, quantised ones in 8-bit; on the way out the same of o, in 16 bits. The cache lies where
    its heads are and never travels. Raises ValueError where n does not divide them."""
    tokens = preset.chunk * math.prod(preset.grid)
    if gpus < 1 or preset.dit.heads % gpus or tokens % gpus:
        raise ValueError(
            f"gpus={gpus}: must divide {preset.dit.heads} heads and {tokens} tokens of a chunk"
        )
    element = 3 * (1 if precision == "8-bit" else 2) + 2
    return tokens * preset.dit.dim * element * (gpus - 1) / gpus**2


def multi_gpu(
    preset: Preset, gpu: Gpu, gpus: int, precision: str, decoder: str
) -> list[dict[str, Any]]:
    """Settings with up to `gpus` of them at a full window, by floors: the transformer over n of
    them by `exchange_bytes` (not overlapped, no latency of messages), the decoder after it on one
    of the n, or on one of its own beside the next chunk. That raises FPS and leaves latency."""
    passes, steps = len(preset.steps) + 1, len(preset.steps)
    alone = total(dit(preset, gpu, preset.window, precision).values())["floor_ms"]
    decoded = decode(preset, gpu, precision, decoder)["floor_ms"]
    memory = memory_gib(preset, precision=precision)
    rows: list[dict[str, Any]] = []
    for n in range(1, min(gpus, preset.dit.heads) + 1):
        try:
            sent = exchange_bytes(preset, n, precision)
        except ValueError:
            continue
        exchange = passes * preset.dit.layers * sent / gpu.link_gbps / 1e6
        shared = alone / n + exchange
        for own in (False, True) if n < gpus and decoder != "none" else (False,):
            chunk = max(shared, decoded) if own else shared + decoded
            rows.append(
                {
                    "gpus": n + own,
                    "transformer_gpus": n,
                    "own_decoder": own,
                    "exchange_ms": exchange,
                    "dit_ms": shared,
                    "decode_ms": decoded,
                    "fps": 1e3 * PIXEL_FRAMES * preset.chunk / chunk,
                    "reaction_ms": shared * steps / passes + decoded,
                    "memory_gib": memory["weights"] + memory["cache"] / n,
                }
            )
    return sorted(rows, key=lambda row: (row["gpus"], row["own_decoder"]))
