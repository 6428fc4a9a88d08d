"""Few-step checkpoints, and the settings that they were published or trained with.

Weights do not tell with which steps they were distilled. Published checkpoints are known by the
names of their files, LongLive also by its LoRA; those of this trainer by their metadata.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from sfmodel.config import PRESETS, Preset
from sfmodel.hub import PREFIX
from sfmodel.schedule import FlowSchedule
from sfmodel.weights.lora import Lora
from sfmodel.weights.opening import STEM, Weights, open_weights

LORA_RANK = 256  # of LongLive's
RECORDED = (
    "steps",
    "warped",
    "shift",
    "chunk",
    "first",
    "window",
    "sink",
    "positions",
)  # of a Preset


class Known(NamedTuple):
    """A published checkpoint.

    name: for people. where, file: its repository on Hugging Face and its path there. settings: of a
    Preset. weights: the part of the file that was published for generating; empty where it has but
    one. lora: a file of the repository that is merged into it. note: what a stream here does not do
    as was published.
    """

    name: str
    where: str
    file: str
    settings: Mapping[str, Any]
    weights: str = ""
    lora: str = ""
    note: str = ""
    preset: str = "wan-1.3b"

    def flags(self, but: Sequence[str] = ()) -> str:
        """Options of `sfmodel generate` that make of the preset what was published, without those
        of the settings `but`."""
        own = vars(PRESETS[self.preset])
        words = []
        for name, value in self.settings.items():
            if value != own[name] and name not in but:
                words += flag(name, value)
        words += ["--weights", self.weights] if self.weights and "weights" not in but else []
        words += ["--lora", self.lora] if self.lora and "lora" not in but else []
        return " ".join(words)


def flag(name: str, value: Any) -> list[str]:
    """The option of `sfmodel generate` that sets a field of a Preset."""
    many = value if isinstance(value, tuple) else (value,)
    words = [f"{one:g}" if isinstance(one, float) else str(one) for one in many]
    return [f"--{name}", *([] if value is True else words)]


_SELF_FORCING, _CAUSAL_FORCING = "gdhe17/Self-Forcing", "zhuhz22/Causal-Forcing"
_CAUSVID, _BIDIRECTIONAL = "tianweiy/CausVid", "is bidirectional, which gives noise when streamed"
_DMD: dict[str, Any] = {
    "steps": (1000, 750, 500, 250), "warped": False, "shift": 5.0, "chunk": 3, "first": None,
    "window": 21, "sink": 0,
}  # fmt: skip
_SINK = {"sink": 3, "positions": "relative"}
_ROLLING = "was made to denoise several chunks at a time, each at another step: not done here"
_FIRST_STEPS = "its first chunk was published with --steps 1000 750 500 250: here as the others"

KNOWN = (
    # github.com/guandeh17/Self-Forcing: configs/self_forcing_dmd.yaml over default_config.yaml;
    # README.md (--use_ema); a cache of 32760 tokens in wan/modules/causal_model.py.
    Known(
        "Self Forcing, DMD", _SELF_FORCING, "checkpoints/self_forcing_dmd.pt", _DMD, "generator_ema"
    ),
    # The same: configs/self_forcing_sid.yaml. github.com/tenstorrent/tt-forge-models:
    # self_forcing/pytorch/loader.py (files, generator_ema); github.com/cxh42/distillation-tax:
    # src/wan_env.py (settings of the three).
    Known(
        "Self Forcing, SiD", _SELF_FORCING, "checkpoints/self_forcing_sid.pt", _DMD, "generator_ema"
    ),
    Known(
        "Self Forcing, SiD v2", _SELF_FORCING, "checkpoints/self_forcing_sid_v2.pt", _DMD,
        "generator_ema",
    ),
    Known(
        "Self Forcing, GAN", _SELF_FORCING, "checkpoints/self_forcing_gan.pt", _DMD, "generator_ema"
    ),
    # Its README.md: what training starts from.
    Known(
        "Self Forcing, ODE", _SELF_FORCING, "checkpoints/ode_init.pt", _DMD,
        note="is what training starts from, not a finished model",
    ),
    # github.com/tianweiy/CausVid: configs/wan_causal_dmd.yaml; causvid/models/wan/wan_wrapper.py
    # (shift), causal_inference.py there (the last step, 0, is no pass; 32760 tokens);
    # minimal_inference/autoregressive_inference.py (generator).
    Known(
        "CausVid", _CAUSVID, "autoregressive_checkpoint/model.pt",
        _DMD | {"steps": (1000, 757, 522), "warped": True, "shift": 8.0}, "generator",
    ),
    # The same: configs/wan_causal_dmd_warp_4step_cfg2.yaml; the name of its folder:
    # github.com/cxh42/distillation-tax: src/wan_env.py.
    Known(
        "CausVid, 4 steps", _CAUSVID, "autoregressive_checkpoint_warp_4step_cfg2/model.pt",
        _DMD | {"shift": 8.0}, "generator",
    ),
    # The same: README.md, "Bidirectional Model 1" and "2".
    *(
        Known(f"CausVid, bidirectional {i}", _CAUSVID, f"bidirectional_checkpoint{i}/model.pt", {},
              note=_BIDIRECTIONAL)
        for i in (1, 2)
    ),
    # github.com/NVlabs/LongLive, branch v1.0: configs/longlive_inference.yaml (keys stay rotated at
    # the frames where they were made; longlive_inference_infinity.yaml moves the sink along).
    Known(
        "LongLive 1.3B", "Efficient-Large-Model/LongLive-1.3B", "models/longlive_base.pt",
        _DMD | {"window": 12, "sink": 3, "positions": "absolute"}, lora="models/lora.pt",
    ),
    # github.com/TencentARC/RollingForcing: configs/rolling_forcing_dmd.yaml over
    # default_config.yaml; README.md (--use_ema); wan/modules/causal_model.py (21 frames, the first
    # chunk kept and moved along); pipeline/rolling_forcing_inference.py.
    Known(
        "Rolling Forcing", "TencentARC/RollingForcing", "checkpoints/rolling_forcing_dmd.pt",
        _DMD | _SINK | {"steps": (1000, 800, 600, 400, 200)}, "generator_ema", note=_ROLLING,
    ),
    # github.com/thu-ml/Causal-Forcing: README.md (files, --use_ema or not) and
    # configs/causal_forcing_dmd_{chunkwise,framewise,framewise_2step,framewise_1step}.yaml.
    Known(
        "Causal Forcing, chunk-wise", _CAUSAL_FORCING, "chunkwise/causal_forcing.pt", _DMD,
        "generator",
    ),
    Known(
        "Causal Forcing, frame-wise", _CAUSAL_FORCING, "framewise/causal_forcing.pt",
        _DMD | {"chunk": 1}, "generator_ema",
    ),
    Known(
        "Causal Forcing++, 2 steps", _CAUSAL_FORCING, "causal-forcing++/framewise-2step.pt",
        _DMD | {"chunk": 1, "steps": (1000, 500)}, "generator_ema", note=_FIRST_STEPS,
    ),
    Known(
        "Causal Forcing++, 1 step", _CAUSAL_FORCING, "causal-forcing++/framewise-1step.pt",
        _DMD | {"chunk": 1, "steps": (1000,)}, "generator_ema", note=_FIRST_STEPS,
    ),
    # The same: long_video/README.md, configs/rolling_forcing_dmd.yaml and wan/modules/
    # causal_model.py there.
    Known(
        "Causal Forcing, long video", _CAUSAL_FORCING, "chunkwise/longvideo.pt", _DMD | _SINK,
        "generator_ema", note=_ROLLING,
    ),
    # github.com/krea-ai/realtime-video: configs/self_forcing_server_14b.yaml (1000, 937, 833, 625:
    # these four, shifted) and release_server.py (3 frames of context and a chunk of 3).
    Known(
        "Krea realtime 14B", "krea/krea-realtime-video", "krea-realtime-video-14b.safetensors",
        _DMD | {"window": 6}, preset="wan-14b",
        note="was published with its window computed anew for each chunk and a pass at t = 0 after "
        "the steps: not done here",
    ),
)  # fmt: skip
# Rows whose file's name another one has are told apart by its folder.
_NAMES = Counter(PurePath(each.file).name for each in KNOWN)


def by_name(path: str | Path) -> Known | None:
    """The checkpoint that has the name of a file, or one on the Hub (`hf:…`, also of a repository
    with a single one)."""
    said = PurePath(re.sub(r"@[^/]+", "", str(path).removeprefix(PREFIX)))
    for each in KNOWN:
        file = PurePath(each.file)
        parts = 1 if _NAMES[file.name] == 1 else 2
        if said.parts[-parts:] == file.parts[-parts:]:
            return each
    of_hub = [each for each in KNOWN if str(path).startswith(PREFIX) and each.where == str(said)]
    return of_hub[0] if len(of_hub) == 1 else None


def by_lora(loras: Sequence[Lora]) -> Known | None:
    """LongLive, where one of the LoRAs is as its own: of that rank, in the training code's
    `generator_lora`. A file that cannot be opened is none; nothing is fetched."""
    (longlive,) = (each for each in KNOWN if each.lora)
    for lora in loras:
        if str(lora.path) == f"{PREFIX}{longlive.where}/{longlive.lora}":
            return longlive
        with suppress(ValueError, OSError):
            found = open_weights(lora.path) if lora.path.is_file() else None
            if found and found.entry == "generator_lora":
                ranks = {len(x) for name, x in found.tensors.items() if ".lora_A." in name}
                if ranks == {LORA_RANK}:
                    return longlive
    return None


def recorded(name: str, preset: Preset) -> dict[str, Any]:
    """Metadata of weights that were trained to stream as `preset` does, of the sizes of that of a
    name; `by_metadata` reads it."""
    return {"preset": name, "stream": {field: getattr(preset, field) for field in RECORDED}}


def by_metadata(path: str | Path | None) -> Known | None:
    """Settings that a file of this trainer says of itself; None for any other one, and for what is
    not whole."""
    with suppress(ValueError, TypeError, KeyError, AttributeError, OSError):
        if path is not None and Path(path).suffix == ".safetensors" and Path(path).is_file():
            said = open_weights(path).metadata
            name, stream = json.loads(said["preset"]), json.loads(said["stream"])
            settings = {**{each: stream[each] for each in RECORDED}, "steps": (*stream["steps"],)}
            preset = replace(PRESETS[name], **settings).check()
            counts = *preset.steps, preset.chunk, preset.first or 1, preset.window, preset.sink
            if {*map(type, counts)} == {int}:
                FlowSchedule(preset.shift).warp(preset.steps)
                return Known("trained here", "", "", settings, preset=name)
    return None


def its_lora(known: Known, path: str | Path) -> list[Lora]:
    """The LoRA that belongs to a checkpoint, beside it or in its repository on the Hub; none where
    it has none or that is not there."""
    beside = Path(path).with_name(PurePath(known.lora or "none").name)
    if known.lora and str(path).startswith(PREFIX):
        return [Lora(Path(f"{PREFIX}{known.where}/{known.lora}"))]
    return [Lora(beside)] if known.lora and beside.is_file() else []


def is_wans_own(found: Weights) -> bool:
    """Tells whether a file has the name of Wan2.1's own weights, official or of diffusers, which
    are of a bidirectional model. Weights themselves do not tell it from a causal one."""
    return found.files[0].name.startswith(STEM)
