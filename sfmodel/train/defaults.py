"""Defaults of a training run's settings, by model and recipe."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, get_args

from sfmodel import assets
from sfmodel.config import PRESETS
from sfmodel.train.config import RECIPES, TrainConfig

WEIGHTS = Path(__file__).parent.parent / "toy" / "weights"

# A clip of 7 latent frames is 25 pixel frames, in which a fast ball crosses most of the box.
_SHORT = {"frames": (7,), "chunks": (1, 3), "windows": (7,)}
_TEACHER, _INIT = WEIGHTS / "toy_teacher.safetensors", WEIGHTS / "toy_ode.safetensors"
_TOY: dict[str, Any] = dict(
    optimizer="muon", lr=2e-3, warmup=50, decay_fraction=0.6, betas=(0.9, 0.95), clip=1.0,
    ema=0.99, ema_start=0, min_sigma=0.3, guidance_scale=1.0, teacher_steps=48, log_every=20,
    save_every=200,
)  # fmt: skip
# Where the weights are random at first, the second half is averaged.
_TOY_BY: dict[str, dict[str, Any]] = {
    "bidirectional": dict(**_SHORT, steps=2400, ema=0.996, ema_start=1200),
    "flow": dict(
        frames=(1, 4, 16), chunks=(1, 3), windows=(6, 9, 15), steps=800, batch=32,
        context_noise=0.4, darken=0.5, ema_start=400,
    ),
    "consistency": dict(
        **_SHORT, steps=300, lr=4e-4, decay_fraction=0.8, ema=0.98, init=_TEACHER, teacher=_TEACHER
    ),
    "ode": dict(**_SHORT, steps=500, lr=1e-3, ema=0.98, init=_TEACHER, teacher=_TEACHER),
    "distillation": dict(
        **_SHORT, steps=40, batch=24, optimizer="adamw", lr=1e-4, lr_critic=3e-4, warmup=5,
        decay_fraction=1.0, betas=(0.0, 0.99), weight_decay=0.0, ema=0.8, critic_warmup=20,
        drop_text=0.0, init=_INIT, teacher=_TEACHER, log_every=5, save_every=10,
    ),
}  # fmt: skip
# The negative prompt that the public Self Forcing trains with (configs/self_forcing_dmd.yaml).
NEGATIVE = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，"
    "JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，"
    "手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
_WAN: dict[str, Any] = dict(
    negative=NEGATIVE, bf16=True, recompute=True, micro_batch=1, drop_text=0.0, drop_word=0.0,
)  # fmt: skip
ODE_INIT = Path("checkpoints/ode_init.pt")  # of the public Self Forcing
Variant = Literal["paper", "one-node"]
_WAN_BY: dict[str, dict[str, Any]] = {
    "paper": dict(shard=8, pairs=16_000),  # 64 ranks on nodes of 8, whose copies are whole
    "one-node": dict(pairs=1_500),  # CausVid's
}


def defaults(preset: str = "toy", recipe: str = "tf", variant: str = "paper") -> TrainConfig:
    """The settings that a recipe has on a preset: those of the paper (and of the public
    configuration where the paper is silent) for Wan2.1, those that were found to work for the toy,
    which has no variants. variant: "paper" distils Wan2.1-1.3B by DMD from a real score of 14B, on
    64 ranks; "one-node" from one of its own size, on however many there are. Raises ValueError for
    another.

    The paper counts 600 updates of the critic, of which every fifth comes with one of the
    generator: 120 here, and its average begins after 200 of them: 40 here.
    """
    if variant not in get_args(Variant):
        raise ValueError(f"variant={variant!r}: must be one of {', '.join(get_args(Variant))}")
    objective = RECIPES.get(recipe, RECIPES["tf"])
    streamed: dict[str, Any] = {"positions": PRESETS[preset].positions}
    if preset == "toy":
        others = "distillation" if objective.needs_critic else "flow"
        others = "ode" if objective.needs_trajectories else others
        own = _TOY_BY.get(recipe, _TOY_BY[others])
        return TrainConfig(recipe, **streamed, **{**_TOY, **own})
    base, real = official(preset), preset
    if (variant, preset) == ("paper", "wan-1.3b") and recipe.endswith("+dmd"):
        real = "wan-14b"  # the public configuration of SiD has 1.3B
    return TrainConfig(
        recipe,
        preset,
        init=assets.default_folder() / ODE_INIT if objective.needs_critic else base,
        teacher=official(real) if objective.needs_critic or objective.needs_teacher else None,
        teacher_preset=None if real == preset else real,
        critic=None if real == preset else base,
        data=Path("data"),
        **streamed,
        **{**_WAN, **_WAN_BY[variant], **objective.wan_settings},
    )


def official(preset: str) -> Path:
    """The published weights of a preset, the base model: where `assets.find` finds them, else where
    `sfmodel doctor` has them downloaded to."""
    with suppress(ValueError):  # there is no folder of models
        if found := assets.find(None, preset).dit:
            return found
    public = assets.PUBLIC[preset]["dit"]
    shards = "" if public.files else ".index.json"
    return (
        assets.default_folder() / Path(public.where).name / f"{assets.WEIGHTS}.safetensors{shards}"
    )
