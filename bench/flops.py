"""Arithmetic of a DiT pass, in floating-point operations (a multiply-add is two)."""

from __future__ import annotations

import math

from sfkernels import BlockLayout
from sfmodel.config import DiTConfig


def pass_flops(config: DiTConfig, tokens: int, pairs: int) -> int:
    """One forward pass over `tokens` tokens of which `pairs` (query, key) pairs attend to each
    other; the prompt's keys and values are cached. Matrix products and attention only."""
    d = config.dim
    linears = 4 * d * d + 2 * d * d + 2 * d * config.ffn_dim  # self, cross, FFN
    per_layer = tokens * linears + 2 * d * (pairs + tokens * config.text_len)
    ends = tokens * 2 * math.prod(config.patch) * config.channels * d
    return 2 * (config.layers * per_layer + ends)


def rolling_flops(
    config: DiTConfig, frame_tokens: int, window: int, chunk: int, steps: int
) -> dict[str, int]:
    """One chunk of a stream whose window is full, by each way of `rolling.py`."""
    n = frame_tokens
    context = window - chunk

    def cached(frames: int, seen: int) -> int:
        return pass_flops(config, frames * n, frames * n * seen * n)

    whole = BlockLayout((context, chunk), n)
    prefill = [cached(chunk, seen) for seen in range(chunk, context + 1, chunk)]
    return {
        "recompute window": steps * pass_flops(config, whole.tokens, whole.pairs),
        "recompute cache": sum(prefill) + steps * cached(chunk, window),
        "ring cache": (steps + 1) * cached(chunk, window),
    }
