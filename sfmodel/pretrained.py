"""Parts that a preset runs with: its model, its video codec and its text encoder, with the weights
that the toy ships with or the public ones of Wan2.1 from a local folder (`sfmodel.assets`)."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Literal, Protocol, cast

import torch
from torch import Tensor

from sfkernels.dispatch import choose
from sfmodel import assets
from sfmodel.config import PRESETS, Preset
from sfmodel.dit import DiT
from sfmodel.extras import needed
from sfmodel.hub import local
from sfmodel.toy.text import ToyTextEncoder
from sfmodel.toy.vae import ToyVAE
from sfmodel.vae.codec import VideoCodec
from sfmodel.vae.convolution import channels_last
from sfmodel.vae.taehv import TinyVAE
from sfmodel.vae.wan import WanVAE
from sfmodel.weights import checkpoint as checkpoints
from sfmodel.weights import names
from sfmodel.weights.lora import Lora, merge, read_lora
from sfmodel.weights.opening import open_weights, recognised
from sfmodel.weights.sizes import dit_config

with needed():
    from rich.console import Console

log = logging.getLogger(__name__)
TOY_WEIGHTS = Path(__file__).parent / "toy" / "weights" / "toy.safetensors"
TOY_TEACHER = TOY_WEIGHTS.with_stem("toy_teacher")
Vae = Literal["auto", "wan", "tiny"]


class TextEncoder(Protocol):
    """Sentences to embeddings [B, T, text_dim]; short ones end in rows of zeros."""

    text_dim: int
    text_len: int

    @property
    def identity(self) -> str:
        """Name that tells encoders apart."""
        ...

    def __call__(self, sentences: Sequence[str], device: torch.device | str = "cpu") -> Tensor: ...

    def rows(
        self, sentences: Iterable[str], device: torch.device | str = "cpu"
    ) -> Iterator[Tensor]:
        """The embedding [T, text_dim] of each sentence as it comes, on the CPU."""
        ...


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def default_dtype(device: torch.device) -> torch.dtype:
    """Dtype of weights and arithmetic at full size."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def find_preset(name: str) -> Preset:
    """Raises ValueError for a preset that does not exist."""
    if name not in PRESETS:
        raise ValueError(f"preset={name!r}: must be one of {', '.join(PRESETS)}")
    return PRESETS[name]


def sized(preset: Preset, height: int | None, width: int | None) -> Preset:
    """The preset at a resolution in pixels, its own where None. Raises ValueError where that is not
    one of whole tokens."""
    _, ph, pw = preset.dit.patch

    def latents(name: str, pixels: int | None, patch: int, own: int) -> int:
        unit = WanVAE.spatial_factor * patch
        if pixels is not None and (pixels < unit or pixels % unit):
            raise ValueError(f"{name}={pixels}: must be a multiple of {unit} pixels")
        return own if pixels is None else pixels // WanVAE.spatial_factor

    return replace(
        preset,
        height=latents("height", height, ph, preset.height),
        width=latents("width", width, pw, preset.width),
    )


@contextmanager
def progress(doing: str) -> Iterator[None]:
    """Shows in a terminal what is being done, elsewhere prints what took longer than a second."""
    console, began = Console(stderr=True), time.perf_counter()
    with console.status(doing):
        yield
    seconds = time.perf_counter() - began
    if seconds > 1 and not console.is_terminal:
        print(f"{doing}: {seconds:.1f} s", file=sys.stderr)


def load_model(
    preset: str,
    path: Path | None,
    device: torch.device,
    models: Path | None = None,
    loras: Sequence[Lora] = (),
) -> DiT:
    """The transformer of a preset with the weights at `path`; None: the shipped ones of the toy, or
    the first few-step generator in the folder of models. loras: merged into it. Raises ValueError
    where there is none."""
    return checked_model(preset, path, device, models, loras)()


def checked_model(
    preset: str,
    path: Path | None,
    device: torch.device,
    models: Path | None = None,
    loras: Sequence[Lora] = (),
    base: bool = False,
    weights: str | None = None,
    attention_impl: str = "auto",
) -> Callable[[], DiT]:
    """Loader for later: checks now, and raises ValueError, as `load_model` does. base: it makes
    whole clips, and without a path it is the bidirectional model of many steps. weights: as of
    `open_weights`. attention_impl: as of `DiT`."""
    config = find_preset(preset).dit
    toy, kind = preset == "toy", "dit" if base else "generators"
    if path is None and not toy and kind not in assets.PUBLIC[preset]:
        raise ValueError(f"preset={preset!r}: has no public few-step weights: name a checkpoint")
    if path is None and toy:
        path = TOY_TEACHER if base else TOY_WEIGHTS
    elif path is None:
        path = _needed(kind, preset, models)
    dtype = torch.float32 if toy else default_dtype(device)
    q = torch.empty(0, config.head_dim, dtype=dtype, device=device)
    for op in ("attention" if base else "ring_attention", "cross_attention"):
        choose(op, attention_impl, q.device, q=q)

    def build() -> DiT:
        return DiT(config, attention_impl=attention_impl)

    load = checkpoints.checked(build, path, device=device, dtype=dtype, weights=weights)
    with torch.device("meta"):
        wanted = names.to_official(DiT(config).state_dict()) if loras else {}
    changes = [read_lora(lora, wanted) for lora in loras]

    def loaded() -> DiT:
        with progress(f"loading {path}"):
            model = load().eval()
            for change in changes:
                merge(model, change)
            return model

    return loaded


def from_pretrained(
    name: str | Path,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> DiT:
    """A transformer of any size, from a path or a name on the Hugging Face Hub (`hf:owner/name`):
    its weights and shapes, and the config.json or the metadata beside them. device: a GPU if there
    is one. dtype: bfloat16 on a GPU, else float32. Raises ValueError for what is none."""
    place = torch.device(device) if device is not None else default_device()
    path = local(name)
    found = open_weights(path, family="DiT")
    state, (family, label) = recognised(found)
    if family != "DiT":
        raise ValueError(f"{name}: is {label or 'no model that is known'}: must be a Wan2.1 DiT")
    config = dit_config(path, found, state)
    dtype = dtype or default_dtype(place)
    return checkpoints.load_model(lambda: DiT(config), path, device=place, dtype=dtype).eval()


def load_codec(
    preset: str,
    device: torch.device,
    vae: Vae = "auto",
    models: Path | None = None,
    tile: int | None = None,
) -> VideoCodec:
    """The video codec of a preset. vae: Wan2.1's own, TAEHV, or the first of the two that is there.
    tile: as in `WanVAE`. Raises ValueError where there is none."""
    return checked_codec(preset, device, vae, models, tile)()


def checked_codec(
    preset: str,
    device: torch.device,
    vae: Vae = "auto",
    models: Path | None = None,
    tile: int | None = None,
) -> Callable[[], VideoCodec]:
    """Loader for later: checks now, and raises ValueError, as `load_codec` does."""
    if preset == "toy":
        if vae != "auto" or tile is not None:
            raise ValueError(f"vae={vae!r}, tile={tile}: the toy has one codec, without tiles")
        return lambda: ToyVAE.from_pretrained().to(device)
    find_preset(preset)
    vae = chosen_vae(preset, vae, models)
    if tile is not None and vae == "tiny":
        raise ValueError(f"tile={tile}: only Wan2.1's own decoder works in tiles")
    path = _needed("vae" if vae == "wan" else "tiny_vae", preset, models)
    build: Callable[[], WanVAE | TinyVAE]
    build = (lambda: WanVAE(tile=tile)) if vae == "wan" else TinyVAE
    load = checkpoints.checked(build, path, device=device, dtype=default_dtype(device))

    def loaded() -> VideoCodec:
        # Shapes repeat from chunk to chunk, so it is worth trying which algorithm is the fastest.
        torch.backends.cudnn.benchmark = True
        with progress(f"loading {path}"):
            return cast(VideoCodec, channels_last(load()).eval().requires_grad_(False))

    return loaded


def chosen_generator(preset: str | None, models: Path | None = None) -> Path | None:
    """Few-step weights that `load_model` takes for a preset without a path; None for the toy's own
    and where there are none."""
    with suppress(ValueError):
        if preset and "generators" in assets.PUBLIC.get(preset, {}):
            return next(iter(assets.find(models, preset).generators), None)
    return None


def chosen_vae(preset: str, vae: Vae = "auto", models: Path | None = None) -> Vae:
    """Decoder that `load_codec` loads for a preset other than the toy: "wan" or "tiny"."""
    there = assets.find(models, preset)
    if vae == "auto":
        return "wan" if there.vae or not there.tiny_vae else "tiny"
    return vae


def load_text(preset: str, models: Path | None = None, kept: bool = True) -> TextEncoder:
    """The text encoder of a preset, which takes no memory until it is called. kept: embeddings are
    kept on disk and taken from there. Raises ValueError where there is none."""
    if preset == "toy":
        return ToyTextEncoder()
    from sfmodel.umt5 import UMT5Encoder

    weights, width = _needed("text_encoder", preset, models), find_preset(preset).dit.text_dim
    encoder = UMT5Encoder(weights, _needed("tokenizer", preset, models))
    if encoder.text_dim != width:
        raise ValueError(f"{weights}: its embeddings have {encoder.text_dim} numbers: not {width}")
    if not kept:
        encoder.cache = None
    return encoder


def load_toy(
    path: Path | None = None, device: torch.device | None = None
) -> tuple[DiT, ToyVAE, ToyTextEncoder]:
    """The toy model with the given or the shipped weights, its codec and its text encoder."""
    device = default_device() if device is None else device
    codec = ToyVAE.from_pretrained().to(device)
    return load_model("toy", path, device), codec, ToyTextEncoder()


def _needed(field: str, preset: str, models: Path | None) -> Path:
    found = getattr(assets.find(models, preset), field)
    if field == "generators":
        if len(found) > 1:
            log.warning(
                "of %d few-step generators: %s; --checkpoint names another", len(found), found[0]
            )
        found = found[0] if found else None
    if found is None:
        # What all presets share is listed with the first.
        public = assets.PUBLIC[preset].get(field) or assets.PUBLIC["wan-1.3b"][field]
        folder = assets.default_folder() if models is None else models
        wanted = f"{public.where}: {', '.join(public.files)}"
        raise ValueError(
            f"{folder}: holds no {public.name} for {preset} ({wanted}); `sfmodel doctor` says what "
            "is there"
        )
    return Path(found)
