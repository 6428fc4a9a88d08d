"""Defaults of a training run's settings, by model and recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sfmodel.train.config import RECIPES, TrainConfig

WEIGHTS = Path(__file__).parent.parent / "toy" / "weights"

# A clip of 7 latent frames is 25 pixel frames, in which a fast ball crosses most of the box.
_SHORT = {"frames": (7,), "chunks": (1, 3), "windows": (7,)}
_TEACHER, _INIT = WEIGHTS / "toy_teacher.safetensors", WEIGHTS / "toy_ode.safetensors"
_TOY: dict[str, Any] = dict(
    optimizer="muon", lr=2e-3, warmup=50, decay_fraction=0.6, betas=(0.9, 0.95), clip=1.0,
    ema=0.998, ema_start=0, min_sigma=0.3, guidance_scale=1.0, log_every=20, save_every=200,
)  # fmt: skip
_TOY_BY: dict[str, dict[str, Any]] = {
    "bidirectional": dict(**_SHORT, steps=2400),
    "flow": dict(
        frames=(1, 4, 16), chunks=(1, 3), windows=(6, 9, 15), steps=800, batch=32,
        context_noise=0.4, darken=0.5,
    ),
    "consistency": dict(
        **_SHORT, steps=300, lr=4e-4, decay_fraction=0.8, ema=0.98, init=_TEACHER, teacher=_TEACHER
    ),
    "ode": dict(**_SHORT, steps=500, lr=1e-3, ema=0.995, init=_TEACHER, teacher=_TEACHER),
    "distillation": dict(
        **_SHORT, steps=40, batch=24, optimizer="adamw", lr=1e-4, lr_critic=3e-4, warmup=5,
        decay_fraction=1.0, betas=(0.0, 0.99), weight_decay=0.0, ema=0.98, critic_warmup=20,
        drop_text=0.0, init=_INIT, teacher=_TEACHER, log_every=5, save_every=10,
    ),
}  # fmt: skip
_WAN: dict[str, Any] = dict(bf16=True, recompute=True, micro_batch=1, drop_text=0.0, drop_word=0.0)


def defaults(preset: str = "toy", recipe: str = "tf") -> TrainConfig:
    """The settings that a recipe has on a preset: those of the paper (and of the public
    configuration where the paper is silent) for Wan2.1, those that were found to work for the toy.

    The paper counts 600 updates of the critic, of which every fifth comes with one of the
    generator: 120 here, and its average begins after 200 of them: 40 here.
    """
    objective = RECIPES.get(recipe, RECIPES["tf"])
    if preset == "toy":
        others = _TOY_BY["distillation" if objective.needs_critic else "flow"]
        return TrainConfig(recipe, **{**_TOY, **_TOY_BY.get(recipe, others)})
    folder = Path(f"wan_models/Wan2.1-T2V-{preset.removeprefix('wan-').upper()}")
    official = folder / "diffusion_pytorch_model.safetensors"
    return TrainConfig(
        recipe,
        preset,
        init=Path("checkpoints/ode_init.pt") if objective.needs_critic else official,
        teacher=official if objective.needs_critic or objective.needs_teacher else None,
        data=Path("data"),
        **_WAN,
        **objective.wan_settings,
    )
