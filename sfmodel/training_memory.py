"""Memory of one rank in training, from arithmetic alone: none of it is measured.

FSDP2 cuts weights, gradients, moments and averages into the ranks; what is left whole is what one
micro-batch computes with.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from sfmodel.config import DiTConfig, Preset
from sfmodel.cost import GIB, clip_chunks, parameters
from sfmodel.weights.names import LORA_TARGETS, targeted

# What a block keeps for its backward pass with the Triton kernels, in elements a token: of the
# model's width, of the FFN's, of each head, and a few statistics of rows. Recomputed, its inputs.
KEPT_DIM, KEPT_FFN, KEPT_HEAD, KEPT_ROW = 18.375, 2, 2, 10
KEPT_RECOMPUTED = 2
OF_PROMPT = {"cross_attn.k", "cross_attn.v"}  # layers that see its rows, not the tokens

# Passes with gradient over whole clips that an objective keeps at once: of the real score and of
# the critic in an update of the generator, and of the critic in its own.
SCORES = {"dmd": (0, 0, 1), "sid": (1, 1, 1), "gan": (0, 1, 4)}


def lora_parameters(config: DiTConfig, rank: int, targets: Sequence[str] = LORA_TARGETS) -> int:
    """Number of parameters of a LoRA: rank · (channels in + channels out) of each layer."""
    d, ffn = config.dim, config.ffn_dim
    sizes = {"ffn.0": d + ffn, "ffn.2": ffn + d}
    return config.layers * rank * sum(sizes.get(name, 2 * d) for name in targeted(targets))


def kept_elements(
    config: DiTConfig, recompute: bool, rank: int = 0, targets: Sequence[str] = LORA_TARGETS
) -> float:
    """Elements that autograd keeps of one token in all blocks. With a LoRA of `rank` at most: A of
    each layer's input beside what is kept without."""
    if recompute:
        return config.layers * KEPT_RECOMPUTED * config.dim
    block = KEPT_DIM * config.dim + KEPT_FFN * config.ffn_dim + KEPT_HEAD * config.heads + KEPT_ROW
    return config.layers * (block + rank * len({*targeted(targets)} - OF_PROMPT))


def training_gib(
    preset: Preset,
    recipe: str,
    ranks: int = 1,
    teacher: Preset | None = None,
    micro: int = 1,
    lora_rank: int = 0,
    lora_critic: bool = False,
    *,
    lora_targets: Sequence[str] = LORA_TARGETS,
    chunks: Sequence[int] = (),
    cached: int | None = None,
    recompute: bool = True,
    bf16: bool = True,
) -> dict[str, float]:
    """GiB of one rank at the peak of an update, of the generator or of the critic, by what takes
    it. A discriminator's head is left out.

    ranks: that share one copy of the weights. teacher: the real score's sizes, the generator's if
    None. micro: clips at a time. lora_rank: of what the generator learns in place of its weights,
    with `lora_critic` the critic, too. chunks: latent frames of each of a clip's, the preset's if
    not given. cached: latent frames whose keys and values a rollout holds, the clip's if None.
    recompute: of models that see whole clips. bf16: of the arithmetic.

    "activations": self forcing keeps one step of one chunk, however many steps come before the
    exit; a model that sees whole clips the inputs of every block, and one whole block. "cache":
    keys and values, which take no gradient. "gathered": the largest part of a block, twice,
    for the next one is gathered meanwhile; alone, autocast's copies of weights that learn."""
    config, frame, size = preset.dit, math.prod(preset.grid), 2 if bf16 else 4
    real_config = teacher.dit if teacher else config
    chunks = chunks or clip_chunks(preset)
    context, _, objective = recipe.partition("+")
    own, low = parameters(config), lora_parameters(config, lora_rank, lora_targets)
    # Weights that learn and that are frozen.
    learned, frozen = (low, own) if lora_rank else (own, 0)
    average = learned
    if objective in ("dmd", "sid") or context == "ode":
        frozen += parameters(real_config)
    if objective:
        learned += low if lora_critic else own
        frozen += own if lora_critic else 0

    def whole(config: DiTConfig, rank: int, tokens: int) -> float:
        """Elements kept of a pass over whole clips."""
        kept = kept_elements(config, False, rank, lora_targets)
        if recompute:
            kept = kept / config.layers + kept_elements(config, True)
        return tokens * kept

    clip, cache = sum(chunks) * frame, 0.0
    critic = whole(config, lora_rank if lora_critic else 0, clip)
    real, fake, in_critic = SCORES.get(objective, (0, 0, 0))
    scores = real * whole(real_config, 0, clip) + fake * critic
    if context == "sf":
        cached = sum(chunks) if cached is None else cached
        cache = 2 * config.layers * cached * frame * config.dim
        kept = kept_elements(config, False, lora_rank, lora_targets)
        activations = max(max(chunks) * frame * kept, scores)
    else:
        forcing = 2 if context in ("tf", "ode") else 1
        activations = whole(config, lora_rank, forcing * clip) + scores
    # A critic learns without the cache of the rollout that it learns from.
    activations, cache = max((activations, cache), (in_critic * critic, 0.0), key=sum)
    if ranks == 1:
        gathered = learned if bf16 else 0
    else:
        gathered = 2 * max(2 * config.dim * config.ffn_dim, 4 * config.dim**2)
    parts = {
        "weights": (4 * learned + size * frozen) / ranks,
        "gradients": 4 * learned / ranks,
        "moments": 8 * learned / ranks,
        "average": 4 * average / ranks,
        "activations": size * micro * activations,
        "cache": size * micro * cache,
        "gathered": size * gathered,
    }
    gib = {name: nbytes / GIB for name, nbytes in parts.items()}
    return {**gib, "total": sum(gib.values())}
