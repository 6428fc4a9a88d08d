"""Defaults of training: those that docs/recipe.md names, by variant; and what a saved run lacks."""

from __future__ import annotations

import ast
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sfmodel.cli import main
from sfmodel.train.config import RECIPES, TrainConfig
from sfmodel.train.defaults import defaults

PAGE = Path(__file__).parent.parent / "docs" / "recipe.md"
SECTIONS = re.split(r"^## ", PAGE.read_text(), flags=re.M)[1:]
WAN = Path("nowhere")
OF_14B = WAN / "Wan2.1-T2V-14B" / "diffusion_pytorch_model.safetensors.index.json"
OF_1_3B = WAN / "Wan2.1-T2V-1.3B" / "diffusion_pytorch_model.safetensors"

# Settings that came with the arithmetic of the public code: a run that has none of them is older.
ADDED: dict[str, Any] = {
    "betas_critic": (0.1, 0.9), "clip_critic": 1.0, "fake_guidance_scale": 2.0, "sid_alpha": 0.5,
    "min_score_timestep": 5, "ts_schedule": True, "ts_schedule_max": True, "score_shift": 8.0,
    "discriminator_lr_multiplier": 2.0, "discriminator_warmup": 3, "teacher_shift": 8.0,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _no_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """None that this machine has."""
    monkeypatch.setenv("SFMODEL_MODELS", str(WAN))


def rows(section: str) -> list[list[str]]:
    """Cells of a section's table, without its head."""
    lines = [line for line in section.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.mark.parametrize("section", SECTIONS[1:], ids=lambda section: section.splitlines()[0])
def test_the_page_names_the_defaults(section: str) -> None:
    """Every setting in the last column, by its name or with its value, of each recipe that the
    heading names."""
    recipes = re.findall(r"`([^`]+)`", section.splitlines()[0])
    assert recipes and all(name in RECIPES for name in recipes)
    named = 0
    for *cells, settings in rows(section):
        assert len(cells) == 4 and cells[0] and cells[1]
        for setting in re.findall(r"`([^`]+)`", settings):
            name, _, value = setting.partition("=")
            for recipe in recipes:
                default = getattr(defaults("wan-1.3b", recipe), name)
                assert not value or default == ast.literal_eval(value), (recipe, setting)
            named += 1
    assert named >= 3


def test_the_page_names_the_variants() -> None:
    said = {line[0]: line[1:] for line in rows(SECTIONS[0])}
    both = [defaults("wan-1.3b", "sf+dmd", variant) for variant in ("paper", "one-node")]
    assert [config.teacher for config in both] == [OF_14B, OF_1_3B]
    assert said["real score of `…+dmd` for a generator of 1.3B"] == ["Wan2.1-14B", "Wan2.1-1.3B"]
    assert [config.shard for config in both] == [8, 0]
    assert said["ranks that share a copy of the weights"] == ["8, those of a node", "all"]
    pairs = [defaults("wan-1.3b", "ode", variant).pairs for variant in ("paper", "one-node")]
    assert pairs == [16_000, 1_500]
    assert said["trajectories for ODE regression"] == ["16,000", "1,500 (CausVid's)"]
    size, text = 4 * 5 * 21 * 16 * 60 * 104, 4 * 512 * 4096  # float32, of five points
    assert (round(size / 1e6, 1), round(text / 1e6, 1)) == (41.9, 8.4)
    assert round(16_000 * (size + text) / 1e9) == 805
    assert "41.9 MB" in SECTIONS[0] and "up to 8.4" in SECTIONS[0] and "805 GB" in SECTIONS[0]


@pytest.mark.parametrize("variant", ["paper", "one-node"])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("preset", ["wan-1.3b", "wan-14b"])
def test_weights_of_all_recipes(preset: str, recipe: str, variant: str) -> None:
    """A real score of another size needs a critic of the generator's; 64 clips divide into 64 ranks
    and into 8."""
    config, objective = defaults(preset, recipe, variant), RECIPES[recipe]
    own = {"wan-1.3b": OF_1_3B, "wan-14b": OF_14B}[preset]
    larger = (preset, variant) == ("wan-1.3b", "paper") and recipe.endswith("dmd")
    if larger:
        assert (config.teacher_preset, config.teacher, config.critic) == ("wan-14b", OF_14B, own)
    else:
        needed = own if objective.needs_critic or objective.needs_teacher else None
        assert (config.teacher_preset, config.teacher, config.critic) == (None, needed, None)
    assert config.init == (WAN / "checkpoints/ode_init.pt" if objective.needs_critic else own)
    assert config.batch % 64 == 0 and config.micro_batch == 1


@pytest.mark.parametrize("recipe", RECIPES)
def test_averages_of_the_toy_forget_where_they_began(recipe: str) -> None:
    """Random weights never enter one, however few updates there are."""
    config = defaults("toy", recipe)
    assert config.ema ** (config.steps - config.ema_start) < 0.02
    assert config.init is not None or config.ema_start == config.steps // 2


def test_variants_are_of_wan_alone() -> None:
    assert defaults("toy", "sf+dmd", "one-node") == defaults("toy", "sf+dmd")
    assert defaults("wan-1.3b", "sf+dmd") == defaults("wan-1.3b", "sf+dmd", "paper")
    with pytest.raises(ValueError, match=r"variant='two-node': must be one of paper, one-node"):
        defaults("wan-1.3b", "sf+dmd", "two-node")


@pytest.mark.parametrize(
    ("words", "shown"),
    [("--variant one-node", OF_1_3B), ("--variant=paper", OF_14B), ("", OF_14B)],
)
def test_a_variant_is_chosen_on_the_command_line(
    words: str, shown: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = f"sfmodel train --preset wan-1.3b --recipe sf+dmd {words} --help"
    monkeypatch.setattr(sys, "argv", command.split())
    with pytest.raises(SystemExit) as ended:
        main.main()
    out = "".join(re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().out).split())
    assert ended.value.code == 0 and "--variant{paper,one-node}" in out
    assert f"trajectories(default:{shown})" in out


def test_a_saved_run_without_the_new_settings_is_as_by_default() -> None:
    assert ADDED.keys() <= TrainConfig.__dataclass_fields__.keys()
    config = replace(defaults("toy", "sf+gan"), ema=0.0)
    saved = {name: value for name, value in config.plain().items() if name not in ADDED}
    assert config.differing(saved) == {} and config.differing(config.plain()) == {}
    for name, value in ADDED.items():
        other = replace(config, **{name: value})
        assert config.plain()[name] == other.differing(saved)[name] != other.plain()[name]
        assert other.differing(other.plain()) == {}


@pytest.mark.parametrize(
    ("recipe", "ema", "reasons"),
    [
        ("tf", 0.0, []),
        ("df", 0.9, ["its average began with smaller decays"]),
        ("sf+dmd", 0.0, ["its scores had other noise levels"]),
        ("ode", 0.0, ["its loss counted chunks that are clean"]),
        (
            "tf+gan",
            0.9,
            [
                "its average began with smaller decays",
                "its scores had other noise levels",
                "its discriminator had other penalties",
            ],
        ),
    ],
)
def test_what_a_run_of_an_earlier_version_computed(
    recipe: str, ema: float, reasons: list[str]
) -> None:
    config = replace(defaults("toy", recipe), ema=ema)
    saved = {name: value for name, value in config.plain().items() if name not in ADDED}
    assert config.changed(saved) == reasons and config.changed(config.plain()) == []


@pytest.mark.parametrize(
    ("recipe", "change", "said"),
    [
        ("sf+dmd", {"discriminator_warmup": 1}, "has no discriminator: must be 0"),
        ("sf+gan", {"discriminator_warmup": -1}, "discriminator_warmup=-1: must be at least 0"),
        ("sf+dmd", {"min_score_timestep": 1000}, "min_score_timestep=1000: must be at least 0 and"),
        ("sf+dmd", {"min_score_timestep": 100, "ts_schedule_max": True}, "be less than 100, wh"),
        ("sf+dmd", {"score_shift": 0.0}, "score_shift=0.0: must be at least 0.01"),
        ("ode", {"teacher_shift": -8.0}, "teacher_shift=-8.0: must be at least 0.01"),
        ("sf+dmd", {"betas_critic": (0.0, 1.5)}, r"\(0.0, 1.5\): must be at least 0 and"),
        ("sf+dmd", {"clip_critic": -1.0}, "clip_critic=-1.0: must be at least 0"),
    ],
)  # fmt: skip
def test_bad_settings(recipe: str, change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        replace(defaults("toy", recipe), **change)
