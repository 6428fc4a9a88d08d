"""FLOPs, bytes, floors and memory of streams, and memory of training, at any resolution, window,
chunk and number of steps, from arithmetic alone. `python -m bench predict` shows it.

"Floor" is FLOPs over the attainable rate of matrix products or bytes over that of a copy, whichever
takes longer, summed over the components: no launch gaps, no exponentials, no decoder's bytes.
"Whole waves" also counts the multiprocessors that idle in the last wave of tiles. All of it is
predicted, none of it measured. What training takes of memory is in training_memory.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from sfkernels.roofline import attention_bytes, attention_flops, norm_bytes, qk_norm_rope_bytes
from sfmodel.config import DiTConfig, Preset
from sfmodel.vae.flops import WAN_DECODER, decode_flops

GIB = 2**30
VAE_STRIDE = 8  # pixels of a latent, each way
PIXEL_FRAMES = 4  # of a latent frame; the very first one makes a single one
CLIP = 21  # latent frames of the clips that Wan2.1 is trained on: 81 pixel frames
TILE = 128  # rows, and columns, of one multiprocessor's share of a matrix product
MOST_SPLITS = 8  # of the keys of attention
QKV, PATCHES, HEAD = "q, k, v", "patch embedding", "head"


def pixel_frames(latent_frames: int) -> int:
    """Pixel frames of a clip of so many latent ones."""
    return 1 + PIXEL_FRAMES * (latent_frames - 1)


# --- The diffusion transformer


def linears(config: DiTConfig) -> list[tuple[str, int, int, int]]:
    """(name, how often in a pass, channels in, channels out) of all matrix products whose rows are
    tokens. The prompt's keys and values are computed once a prompt and the modulation has one row
    a frame: neither counts."""
    d, ends = config.dim, math.prod(config.patch) * config.channels
    return [
        (QKV, config.layers, d, 3 * d),
        ("attention's output, cross-attention's q and output", 3 * config.layers, d, d),
        ("FFN's first", config.layers, d, config.ffn_dim),
        ("FFN's second", config.layers, config.ffn_dim, d),
        (PATCHES, 1, ends, d),
        (HEAD, 1, d, ends),
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
    """FLOPs of one forward pass over `tokens` tokens of which `pairs` (query, key) pairs attend to
    each other; the prompt's keys and values are cached. Matrix products and attention only."""
    return sum(pass_parts(config, tokens, pairs))


def causal_pairs(chunks: Sequence[int], frame_tokens: int) -> int:
    """(query, key) pairs where each chunk sees itself and all before it; chunks in frames.
    `BlockLayout.pairs` without a window, and half of it under teacher forcing: there a clean chunk
    and its noisy twin see equally many."""
    return frame_tokens**2 * sum(c * sum(chunks[: i + 1]) for i, c in enumerate(chunks))


def rolling_flops(
    config: DiTConfig, frame_tokens: int, window: int, chunk: int, steps: int
) -> dict[str, int]:
    """FLOPs of one chunk of a stream whose window is full, by each way of `extrapolate.py`."""
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
    weights = parameters(config) * size / GIB
    cache = 2 * config.layers * batch * rows * config.dim * size / GIB
    return {"weights": weights, "cache": cache, "total": weights + cache}


# --- Machines


@dataclass(frozen=True)
class Gpu:
    """A GPU. matmul_tflops, copy_tbps: attainable TFLOP/s of bf16 matrix products and TB/s of a
    copy, bytes read and written. eight_bit: rate of 8-bit matrix products over that of bf16.
    memory_gib: about what the driver reports. link_gbps: GB/s to another GPU, one direction, by
    NVLink or else PCIe. source: of the two rates."""

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
SOURCES = {"h200": "measured"}
GPUS = {
    key: Gpu(
        name, multiprocessors, tflops * MATMUL_SHARE, tbps * COPY_SHARE, gib, link * LINK_SHARE,
        source=SOURCES.get(key, "data sheet × the H200's share of its data sheet"),
    )
    for key, (name, multiprocessors, tflops, tbps, gib, link) in SHEETS.items()
}  # fmt: skip


def waves(rows: int, columns: float, multiprocessors: int, split: int = 1) -> float:
    """Share of the multiprocessors' time in whole waves that is spent on useful tiles, one tile a
    multiprocessor at a time. columns: tiles side by side; the heads of attention, channels out /
    128 of a linear. split: parts of the keys, each a tile of its own."""
    tiles = math.ceil(rows / TILE) * math.ceil(columns) * split
    useful = rows / TILE * columns * split
    return useful / (math.ceil(tiles / multiprocessors) * multiprocessors)


def best_split(rows: int, heads: int, multiprocessors: int) -> int:
    """Smallest split of attention's keys that fills its waves best, the merging not counted."""
    splits = range(1, MOST_SPLITS + 1)
    return max(splits, key=lambda s: waves(rows, heads, multiprocessors, split=s))


# --- Times

Row = dict[str, float]  # of a component: its TFLOP, GB and milliseconds
TIMES = ("floor_ms", "whole_waves_ms")


def _row(gpu: Gpu, precision: str, flops: float, nbytes: float, share: float = 1.0) -> Row:
    """Row of a component. share: of the multiprocessors' time that its waves of arithmetic fill."""
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


class Way(NamedTuple):
    """Way to run a chunk's passes. merged: the cache update with the next chunk's first step, as
    one pass of twice the rows. epilogue: GELU in the matrix product before it, else a pass of its
    own. split: the keys of attention, where that fills its waves."""

    merged: bool = True
    epilogue: bool = True
    split: bool = True


def dit(
    preset: Preset,
    gpu: Gpu,
    visible: int,
    precision: str = "bf16",
    update: bool = True,
    way: Way | None = None,
) -> dict[str, Row]:
    """The components of the passes over a chunk that sees `visible` latent frames, its own
    included: its steps and, with `update`, the cache update, of whose last layer only q, k and v
    are computed. way: the fastest if None."""
    way = way or Way()
    config, n, sms, steps = preset.dit, math.prod(preset.grid), gpu.multiprocessors, preset.steps
    tokens, keys, d, heads = preset.chunk * n, visible * n, config.dim, config.heads
    layers = config.layers * len(steps) + (config.layers - 1) * update
    size = 1 if precision == "8-bit" else 2  # of operands; outputs have two bytes in both

    products = operands = waved = 0.0
    for name, count, a, b in linears(config):
        updates = count * update
        if name not in (QKV, PATCHES):
            updates = updates // config.layers * (config.layers - 1)  # none of the head
        merged = updates if way.merged else 0
        calls = ((len(steps) * count + updates - 2 * merged, tokens), (merged, 2 * tokens))
        for times, m in calls:
            products += times * 2 * m * a * b
            operands += times * ((m + b) * a * size + m * b * 2)
            waved += times * 2 * m * a * b / waves(m, b / TILE, sms)
    attended, crossed = (
        layers * attention_flops(tokens * seen, heads, config.head_dim)
        for seen in (keys, config.text_len)
    )
    split = best_split(tokens, heads, sms) if way.split else 1

    def qkvo(keys: int) -> int:
        nbytes = attention_bytes(tokens, keys, heads, config.head_dim, size)
        return layers * (nbytes + (2 - size) * tokens * d)

    # Two gated AdaLN and the gated norm of cross-attention read and write two activations each.
    # That of cross-attention's query is free: the factor of its row commutes with the product and
    # its weight folds into the keys. In 8-bit the three normed outputs and q, k, v are one byte.
    pointwise = 3 * norm_bytes(tokens, d, 4, 2) + qk_norm_rope_bytes(tokens, d, config.head_dim, 2)
    pointwise -= (2 - size) * 6 * tokens * d
    rows = {
        "self-attention": _row(
            gpu, precision, attended, qkvo(keys), waves(tokens, heads, sms, split=split)
        ),
        "linears": _row(gpu, precision, products, operands, products / waved),
        "cross-attention": _row(gpu, precision, crossed, qkvo(config.text_len)),
        "norms, RoPE": _row(gpu, precision, 0, layers * pointwise),
    }
    if not way.epilogue:
        activations = norm_bytes(tokens, config.ffn_dim, 2, 2)
        rows["GELU"] = _row(gpu, precision, 0, layers * activations)
    return rows


def decode(
    preset: Preset, gpu: Gpu, precision: str = "bf16", decoder: str = "wan", first: bool = False
) -> Row:
    """A chunk's latents to pixels, by arithmetic alone. TAEHV stays in 16 bits: its channels are
    too few to gain from less."""
    flops = decode_flops(decoder, preset.chunk, preset.height, preset.width, first)
    return _row(gpu, "bf16" if decoder == "taehv" else precision, flops, 0)


def clip_chunks(preset: Preset) -> tuple[int, ...]:
    """Latent frames of each chunk of a clip, as many whole chunks as it holds."""
    first = preset.first or preset.chunk
    return (first, *(preset.chunk,) * ((CLIP - first) // preset.chunk))


def fps(
    preset: Preset,
    gpu: Gpu,
    windows: Sequence[int],
    precision: str,
    decoder: str,
    way: Way | None = None,
) -> Row:
    """Pixel frames a second, the mean over chunks that see `windows` frames; decode included. way:
    as of `dit`."""
    rows = [row for seen in windows for row in dit(preset, gpu, seen, precision, way=way).values()]
    rows += [decode(preset, gpu, precision, decoder)] * len(windows)
    frames = PIXEL_FRAMES * preset.chunk * len(windows)
    return {key.removesuffix("_ms"): 1e3 * frames / total(rows)[key] for key in TIMES}


def latency_ms(preset: Preset, gpu: Gpu, precision: str, decoder: str) -> dict[str, Row]:
    """Latencies in ms: first_frame, of the first chunk, which sees itself alone, and its decode;
    reaction, of a chunk in a full window, which is how long a new prompt or control takes to be
    seen."""
    first = replace(preset, chunk=preset.first or preset.chunk)
    out = {}
    for name, one, seen in (
        ("first_frame", first, first.chunk),
        ("reaction", preset, preset.window),
    ):
        rows = dit(one, gpu, seen, precision, update=False).values()
        decoded = decode(one, gpu, precision, decoder, first=name == "first_frame")
        both = total([*rows, decoded])
        out[name] = {key.removesuffix("_ms"): both[key] for key in TIMES}
    return out


def exchange_bytes(preset: Preset, gpus: int, precision: str = "bf16") -> float:
    """Bytes that each GPU sends (and receives) in one layer of one pass of a chunk, under sequence
    parallelism by all-to-all over heads (DeepSpeed-Ulysses, arXiv 2309.14509).

    A GPU holds 1/n of the chunk's tokens outside attention and 1/n of the heads inside it. On the
    way in it keeps 1/n of its q, k and v and sends the rest, (n − 1)/n of tokens/n · dim elements
    each, quantised ones in 8-bit; on the way out the same of o, in 16 bits. The cache lies where
    its heads are and never travels."""
    tokens = preset.chunk * math.prod(preset.grid)
    element = 3 * (1 if precision == "8-bit" else 2) + 2
    return tokens * preset.dit.dim * element * (gpus - 1) / gpus**2


def multi_gpu(
    preset: Preset, gpu: Gpu, gpus: int, precision: str = "bf16", decoder: str = "wan"
) -> list[dict[str, Any]]:
    """Settings with up to `gpus` of them at a full window, by floors: the transformer over n of
    them by `exchange_bytes` (not overlapped, no latency of messages), where n divides the heads and
    the tokens of a frame, the decoder after it on one of the n, or on one of its own beside the
    next chunk. That raises FPS and leaves latency."""
    heads, frame_tokens = preset.dit.heads, math.prod(preset.grid)
    passes, steps = len(preset.steps) + 1, len(preset.steps)
    alone, stepped = (
        total(dit(preset, gpu, preset.window, precision, update).values())["floor_ms"]
        for update in (True, False)
    )
    decoded = decode(preset, gpu, precision, decoder)["floor_ms"]
    memory = memory_gib(preset, precision=precision)
    rows: list[dict[str, Any]] = []
    for n in (n for n in range(1, min(gpus, heads) + 1) if not (heads % n or frame_tokens % n)):
        sent = exchange_bytes(preset, n, precision)
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
                    "reaction_ms": stepped / n + exchange * steps / passes + decoded,
                    "memory_gib": memory["weights"] + memory["cache"] / n,
                }
            )
    return sorted(rows, key=lambda row: (row["gpus"], row["own_decoder"]))


# --- Memory

# Of a decoder: channels of its largest activation; how many of these there are at once, as
# `tests/test_memory.py` counts them, TAEHV's state among them; parameters.
DECODER_MEMORY = {"wan": (96, 4.3, 126.9e6), "taehv": (64, 2.3, 11.3e6)}


def activations_gib(preset: Preset) -> float:
    """GiB of a stream's largest pass in bfloat16, over two chunks at once, where they are most, in
    an FFN: its hidden channels after GELU, its input, its output, and the residual stream."""
    config, tokens = preset.dit, 2 * preset.chunk * math.prod(preset.grid)
    return 2 * tokens * (config.ffn_dim + 3 * config.dim) / GIB


def decoder_gib(preset: Preset, decoder: str) -> float:
    """GiB of a video VAE in bfloat16: parameters, the peak of a chunk decoded at once, and for
    Wan2.1's own the two frames that each convolution over time looks back at, before and after."""
    channels, peak, weights = DECODER_MEMORY[decoder]
    latents = preset.height * preset.width
    elements = peak * PIXEL_FRAMES * preset.chunk * VAE_STRIDE**2 * latents * channels
    if decoder == "wan":
        inputs = [count * a * space**2 for count, a, _, taps, space, _ in WAN_DECODER if taps == 27]
        elements += 2 * 2 * latents * sum(inputs)
    return 2 * (elements + weights) / GIB
