"""FLOPs and floors of the trainer's updates, from arithmetic alone: matrix products and attention
of one clip, as `sfmodel.train` computes them. `python -m bench predict` shows them.

A backward pass takes twice the products of its forward pass, as many where the input takes no
gradient; in attention five products for two, three where the keys take none (a rollout's past).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from sfkernels.roofline import attention_flops
from sfmodel.config import DiTConfig, Preset
from sfmodel.cost import HEAD, PATCHES, QKV, Gpu, causal_pairs, clip_chunks, linears


class Update(NamedTuple):
    """An update of a recipe's generator or critic. exit_step: index of the few step at which the
    chunks of a self rollout exit."""

    recipe: str
    learner: str = "generator"
    exit_step: int = 0


def figure6(steps: int) -> dict[str, Update]:
    """The updates of Figure 6 (arXiv 2506.08009) by name, with so many few steps: diffusion,
    teacher and self forcing with DMD, SF-n exiting at step n; the generator's, then the critic's.
    """
    rows = {"DF + DMD": Update("df+dmd"), "TF + DMD": Update("tf+dmd")}
    rows |= {f"SF-{i + 1} + DMD": Update("sf+dmd", exit_step=i) for i in range(steps)}
    return rows | {f"{name} critic": row._replace(learner="critic") for name, row in rows.items()}


def to_first(figures: Mapping[str, float]) -> dict[str, float]:
    """The ratio of each figure to SF-1's of the same learner, where there is that one."""
    pairs = {name: f"SF-1 + DMD{' critic' * name.endswith('critic')}" for name in figures}
    return {name: figures[name] / figures[one] for name, one in pairs.items() if one in figures}


class _Pass(NamedTuple):
    """FLOPs of a forward pass. first: of products whose input takes no gradient; outside: of others
    that are in no block; blocks: of those that are; attention; past: what of it is over keys that
    take no gradient."""

    first: int
    outside: int
    blocks: int
    attention: int
    past: int

    @property
    def forward(self) -> int:
        return self.first + self.outside + self.blocks + self.attention

    def learned(self, recompute: bool) -> float:
        """FLOPs of the pass and its backward pass. recompute: the blocks run a second time."""
        outside = 2 * self.first + 3 * self.outside
        blocks = (3 + recompute) * self.blocks + (3.5 + recompute) * self.attention
        return outside + blocks - self.past


def _pass(
    config: DiTConfig, tokens: int, pairs: int, levels: int, past: int = 0, prompts: int = 1
) -> _Pass:
    """A pass, or several together. pairs: (query, key) pairs that attend to each other, those of
    the past included. levels: timesteps that are embedded; prompts: whose keys are computed."""
    d, rows = config.dim, prompts * config.text_len
    ends = {name: a * b for name, _, a, b in linears(config) if name in (PATCHES, HEAD)}
    inner = sum(n * a * b for name, n, a, b in linears(config) if name not in ends)

    def attended(pairs: int) -> int:
        return config.layers * attention_flops(pairs, config.heads, config.head_dim)

    return _Pass(
        2 * (tokens * ends[PATCHES] + rows * config.text_dim * d + levels * config.freq_dim * d),
        2 * (tokens * ends[HEAD] + rows * d * d + levels * 7 * d * d),
        2 * (tokens * inner + rows * config.layers * 2 * d * d),
        attended(pairs + tokens * config.text_len),
        attended(past),
    )


def training_flops(
    preset: Preset,
    update: Update,
    real_score: DiTConfig | None = None,
    guided: bool = True,
    recompute: bool = True,
) -> float:
    """FLOPs of an update on one clip of 21 latent frames (or the whole chunks in it), each chunk
    seeing all before it. update: of the recipe "tf", "df" or one of these or "sf" with DMD.

    Self forcing (arXiv 2506.08009, algorithm 1) runs, without gradient, the steps of every chunk up
    to its exit and the cache's pass; in the generator's update the exit step again, with gradient.
    The others take one pass over the clip. A critic then takes one over what was generated; a
    generator's score is two of the real score, one where it is not guided, and one of the fake one.

    real_score: its sizes, the generator's if None. recompute: a pass over a whole clip runs its
    blocks again in the backward pass."""
    config, n, chunks = preset.dit, math.prod(preset.grid), clip_chunks(preset)
    frames, causal = sum(chunks), causal_pairs(chunks, n)
    context, _, distilled = update.recipe.partition("+")

    def whole(config: DiTConfig) -> _Pass:
        return _pass(config, frames * n, (frames * n) ** 2, 1)

    if context == "sf":
        steps = update.exit_step + 1
        rolled = _pass(config, steps * frames * n, steps * causal, steps * len(chunks))
        own = n**2 * sum(c**2 for c in chunks)
        exits = _pass(config, frames * n, causal, len(chunks), past=causal - own)
        generated = rolled.forward + _cache_flops(config, chunks[:-1], n)
        learned = generated + exits.learned(recompute=False)
    else:
        halves = 2 if context == "tf" else 1  # [clean ‖ noisy]
        one = _pass(config, halves * frames * n, halves * causal, halves * frames)
        generated, learned = one.forward, one.learned(recompute)
    if update.learner == "critic":
        return generated + whole(config).learned(recompute)
    if not distilled:
        return learned
    return learned + (1 + guided) * whole(real_score or config).forward + whole(config).forward


def trajectory_flops(preset: Preset, config: DiTConfig, steps: int, guided: bool = True) -> float:
    """FLOPs of a trajectory of so many Euler steps of a clip, as long as in `training_flops`, by a
    teacher of these sizes."""
    tokens = sum(clip_chunks(preset)) * math.prod(preset.grid)
    return steps * (1 + guided) * _pass(config, tokens, tokens**2, 1).forward


def _cache_flops(config: DiTConfig, chunks: tuple[int, ...], frame_tokens: int) -> int:
    """FLOPs of the passes that leave keys and values of these chunks behind: they end with q, k and
    v of the last layer."""
    tokens, pairs = frame_tokens * sum(chunks), causal_pairs(chunks, frame_tokens)
    others = replace(config, layers=config.layers - 1)
    passes = _pass(others, tokens, pairs, len(chunks), prompts=0)
    last = {name: a * b for name, _, a, b in linears(config)}
    return passes.forward + 2 * tokens * (last[QKV] - last[HEAD])


def floor_seconds(flops: float, gpu: Gpu) -> float:
    """Seconds that so many FLOPs of bfloat16 take at a GPU's attainable rate."""
    return flops / gpu.matmul_tflops / 1e12
