"""How much memory streams and training take on a GPU, worked out. `python -m bench.memory` prints
the table of docs/training.md, `sfmodel doctor` what streams need.

FSDP2 cuts weights, gradients, moments and averages into the ranks; what is left whole is what one
micro-batch computes with.
"""

from __future__ import annotations

import math

from bench.model import PIXEL_FRAMES, VAE_STRIDE, WAN_DECODER, clip_chunks, parameters
from sfmodel.config import PRESETS, DiTConfig, Preset

GIB = 2**30
# Bytes a parameter: float32 weights, gradients, two moments; the generator's average; a frozen one.
LEARNED, AVERAGED, FROZEN = 16, 4, 2
# What a block keeps for its backward pass with the Triton kernels, in elements a token: of the
# model's width, of the FFN's, of each head, and a few statistics of rows. Recomputed, its inputs.
KEPT_DIM, KEPT_FFN, KEPT_HEAD, KEPT_ROW = 18.375, 2, 2, 10
KEPT_RECOMPUTED = 2

# Of a decoder: channels of its largest activation; how many of these there are at once, as
# `tests/test_memory.py` counts them, TAEHV's state among them; parameters.
DECODERS = {"wan": (96, 4.3, 126.9e6), "taehv": (64, 2.3, 11.3e6)}


def activations_gib(preset: Preset) -> float:
    """Of one pass of a stream over a chunk in bfloat16, where they are most, in an FFN: its hidden
    channels before and after GELU, its input, its output, and the residual stream."""
    config, tokens = preset.dit, preset.chunk * math.prod(preset.grid)
    return 2 * tokens * (2 * config.ffn_dim + 3 * config.dim) / GIB


def decoder_gib(preset: Preset, decoder: str) -> float:
    """Of a video VAE in bfloat16: parameters, the peak of a chunk decoded at once, and for Wan2.1's
    own the two frames that each convolution over time looks back at, before and after."""
    channels, peak, weights = DECODERS[decoder]
    latents = preset.height * preset.width
    elements = peak * PIXEL_FRAMES * preset.chunk * VAE_STRIDE**2 * latents * channels
    if decoder == "wan":
        inputs = [count * a * space**2 for count, a, _, taps, space, _ in WAN_DECODER if taps == 27]
        elements += 2 * 2 * latents * sum(inputs)
    return 2 * (elements + weights) / GIB


def kept_elements(config: DiTConfig, recompute: bool) -> float:
    """Elements that autograd keeps of one token in all blocks."""
    if recompute:
        return config.layers * KEPT_RECOMPUTED * config.dim
    block = KEPT_DIM * config.dim + KEPT_FFN * config.ffn_dim + KEPT_HEAD * config.heads + KEPT_ROW
    return config.layers * block


def training_gib(
    preset: Preset, recipe: str, ranks: int = 1, teacher: Preset | None = None, micro: int = 1
) -> dict[str, float]:
    """GiB of one rank at the peak of an update of the generator ("sf+dmd") or of flow matching
    ("tf", "df"), in bfloat16 arithmetic. teacher: the real score's sizes, the generator's if None.

    "activations": self forcing keeps one step of one chunk, however many steps come before the
    exit, and flow matching the inputs of every block of the sequence, and one whole block. "cache":
    keys and values of the clip, without gradient. "gathered": the largest part of a block, twice,
    for the next one is gathered meanwhile; alone, autocast's copy of all weights."""
    config, frame = preset.dit, math.prod(preset.grid)
    own, chunks = parameters(config), clip_chunks(preset)
    distils = "+" in recipe
    weights = (LEARNED + AVERAGED) * own / ranks
    if distils:
        real = parameters(teacher.dit if teacher else config)
        weights += (LEARNED * own + FROZEN * real) / ranks
    largest = max(2 * config.dim * config.ffn_dim, 4 * config.dim**2)
    gathered = 2 * own if ranks == 1 else 2 * 2 * largest
    cache = 0.0
    if recipe.startswith("sf"):
        tokens = max(chunks) * frame
        activations = tokens * kept_elements(config, recompute=False)
        cache = 2 * 2 * config.layers * sum(chunks) * frame * config.dim
    else:
        tokens = sum(chunks) * frame * (2 if recipe.startswith("tf") else 1)
        block = kept_elements(config, recompute=False) / config.layers
        activations = tokens * (kept_elements(config, recompute=True) + block)
    parts = {
        "weights": weights,
        "activations": 2 * micro * activations,
        "cache": micro * cache,
        "gathered": gathered,
    }
    parts = {name: nbytes / GIB for name, nbytes in parts.items()}
    return {**parts, "total": sum(parts.values())}


CASES = (
    ("tf", "wan-1.3b", None, (1, 8)),
    ("df", "wan-1.3b", None, (1, 8)),
    ("sf+dmd", "wan-1.3b", None, (1, 8)),
    ("sf+dmd", "wan-1.3b", "wan-14b", (1, 8, 64)),
    ("sf+dmd", "wan-14b", "wan-14b", (8, 64)),
)


def main() -> None:
    head = ("recipe", "generator", "real score", "GPUs", "weights", "activations", "cache",
            "gathered", "GiB in all")  # fmt: skip
    print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
    for recipe, model, teacher, counts in CASES:
        for ranks in counts:
            gib = training_gib(PRESETS[model], recipe, ranks, PRESETS[teacher] if teacher else None)
            real = (teacher or model) if "+" in recipe else ""
            cells = (recipe, model, real, str(ranks), *(f"{value:.1f}" for value in gib.values()))
            print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
