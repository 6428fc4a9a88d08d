"""Nodes for ComfyUI: a model, a stream of it, the same stream under another prompt, its state in a
file. This folder goes into ComfyUI/custom_nodes; sfkernels into the Python that runs ComfyUI.

ComfyUI keeps what a node gave and gives it to others again, so nothing that leaves a node is ever
changed: a stream leaves as a copy of its state in host memory. What runs is one stream of the
model, which takes up the state that comes in.

Shapes: N images, H×W pixels, 3 colours; T pixel frames.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from sfmodel.config import PRESETS, Preset
from sfmodel.footage import to_pixels
from sfmodel.pretrained import (
    checked_codec,
    checked_model,
    chosen_generator,
    default_device,
    find_preset,
    load_text,
)
from sfmodel.saved_stream import (
    load_stream,
    read_notes,
    read_preset,
    restore,
    save_stream,
    state_of,
)
from sfmodel.schedule import FlowSchedule
from sfmodel.stream import Stream
from sfmodel.weights.known import by_name, its_lora
from sfmodel.weights.opening import open_weights

try:
    from comfy.model_management import throw_exception_if_processing_interrupted
    from comfy.utils import ProgressBar
    from folder_paths import get_output_directory
except ImportError:  # in a script, outside of ComfyUI

    def throw_exception_if_processing_interrupted() -> None:
        """Nobody interrupts."""

    def get_output_directory() -> str:
        return "out"

    ProgressBar = None

log = logging.getLogger(__name__)
SEEDS = {"min": 0, "max": 2**63 - 2}  # as of `check_seed`
FRAMES = {"default": 81, "min": 1, "max": 2**31 - 1}
PROMPT = {"multiline": True, "default": "a large red ball moves up slowly"}
STATE = {"default": "stream.state", "tooltip": "A file in ComfyUI's output folder."}


class Model:
    """A model with its codec, text encoder and settings, and the stream of it that runs."""

    def __init__(self, preset: str, path: Path | None) -> None:
        known = by_name(path) if path else None
        if known and known.preset != preset:
            raise ValueError(f"{path}: is {known.name}: goes with the preset {known.preset}")
        part, loras = None, its_lora(known, path) if known and path else []
        if known and path and known.weights in open_weights(path, family="DiT").entries:
            part = known.weights
        if known and known.lora and not loras:
            log.warning("%s: was published with %s, which is not beside it", path, known.lora)
        device = default_device()
        # All files are checked before one is loaded.
        model = checked_model(preset, path, device, loras=loras, weights=part)
        codec, self.encode = checked_codec(preset, device), load_text(preset)
        self.preset, self.settings = preset, find_preset(preset)
        self.settings = replace(self.settings, **(known.settings if known else {})).check()
        self.model, self.codec = model(), codec()
        self.running: Stream | None = None

    def text(self, prompt: str) -> Tensor:
        """A prompt's embeddings [1, T, E]."""
        return self.encode([prompt], self.model.device)

    def stream(self, settings: Preset) -> Stream:
        """The stream that runs, of these settings, to be restarted or restored."""
        if self.running is None or self.running.preset != settings:
            self.running = None  # its memory is free before that of the next one is taken
            nothing = torch.zeros(1, 1, self.settings.dit.text_dim)
            graph = self.model.device.type == "cuda"
            self.running = Stream(self.model, self.codec, nothing, settings, graph=graph)
        return self.running


class State(NamedTuple):
    """A stream between two frames, never changed: its tensors in host memory and all else."""

    model: Model
    settings: Preset
    title: str
    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any]

    @classmethod
    def of(cls, stream: Stream, model: Model, title: str) -> State:
        tensors, facts = state_of(stream)
        copies = {name: x.to("cpu", copy=True) for name, x in tensors.items()}
        return cls(model, stream.preset, title, copies, facts)

    def stream(self) -> Stream:
        """The stream that runs, at this state."""
        stream = self.model.stream(self.settings)
        restore(stream, self.tensors, self.facts)
        return stream


def images(stream: Stream, frames: int) -> Tensor:
    """The next frames as ComfyUI's images, float32 [N, H, W, 3] in [0, 1] on the host. An
    interruption ends them between two chunks."""
    bar = ProgressBar(frames) if ProgressBar else None
    out = []
    for bytes_BTHWC in stream.frames(frames):
        out.append(bytes_BTHWC[0].float() / 255)
        if bar:
            bar.update(len(out[-1]))
        throw_exception_if_processing_interrupted()
    return torch.cat(out)


@torch.no_grad()
def first_latent(model: Model, image_NHWC: Tensor, settings: Preset) -> Tensor:
    """Latents [1, 1, C, h, w] of a picture that covers the video, cropped around its centre."""
    if len(image_NHWC) != 1:
        raise ValueError(f"start: is {len(image_NHWC)} images: must be 1")
    array = (image_NHWC[0, ..., :3] * 255).round().clamp(0, 255).byte().cpu().numpy()
    size = settings.width * 8, settings.height * 8
    fitted = ImageOps.fit(Image.fromarray(array), size, Image.Resampling.BICUBIC)
    pixels_TCHW = to_pixels([np.asarray(fitted)])
    return model.codec.encode_chunk(pixels_TCHW[None].to(model.model.device))[0]


def state_file(name: str) -> Path:
    """A file in ComfyUI's output folder. Raises ValueError for one elsewhere: workflows come from
    others."""
    folder = Path(get_output_directory()).resolve()
    path = (folder / name).resolve()
    if folder not in path.parents:
        raise ValueError(f"{name}: must be a file in {folder}")
    return path


def weights_file(preset: str, checkpoint: str) -> Path | None:
    """File that a checkpoint's name stands for; of an empty one the few-step weights that are
    there, None for the toy's own."""
    name = checkpoint.strip()
    return Path(name) if name else chosen_generator(preset)


def modified(path: Path | None) -> int:
    """When a file was written last, in ns; 0 where there is none."""
    return path.stat().st_mtime_ns if path and path.exists() else 0


class LoadModel:
    CATEGORY = "sfmodel"
    FUNCTION = "load"
    RETURN_TYPES = ("SFMODEL",)
    RETURN_NAMES = ("model",)
    DESCRIPTION = "A few-step causal video model with its VAE and text encoder."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        about = "A path or hf:owner/name/file; empty: the toy's own, or those in SFMODEL_MODELS."
        return {
            "required": {
                "preset": ([*PRESETS], {"default": "toy"}),
                "checkpoint": ("STRING", {"default": "", "tooltip": about}),
            }
        }

    @classmethod
    def IS_CHANGED(cls, preset: str, checkpoint: str) -> int:
        return modified(weights_file(preset, checkpoint))

    def load(self, preset: str, checkpoint: str) -> tuple[Model]:
        return (Model(preset, weights_file(preset, checkpoint)),)


class StreamVideo:
    CATEGORY = "sfmodel"
    FUNCTION = "stream"
    RETURN_TYPES = ("IMAGE", "SFSTREAM")
    RETURN_NAMES = ("images", "stream")
    DESCRIPTION = "Frames of a new stream, and the stream, to go on from."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        steps = "The few-step list, as 1000 750 500 250; empty: the model's own."
        window = "Latent frames that the cache holds, the chunk included; 0: the model's own."
        sink = "First latent frames that stay in the cache for good; -1: the model's own."
        start = "A picture that the video starts with, scaled to cover it and cropped."
        return {
            "required": {
                "model": ("SFMODEL",),
                "prompt": ("STRING", PROMPT),
                "seed": ("INT", {"default": 0, **SEEDS}),
                "frames": ("INT", FRAMES),
                "steps": ("STRING", {"default": "", "tooltip": steps}),
                "window": ("INT", {"default": 0, "min": 0, "max": 4096, "tooltip": window}),
                "sink": ("INT", {"default": -1, "min": -1, "max": 4096, "tooltip": sink}),
            },
            "optional": {"start": ("IMAGE", {"tooltip": start})},
        }

    def stream(
        self,
        model: Model,
        prompt: str,
        seed: int,
        frames: int,
        steps: str,
        window: int,
        sink: int,
        start: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        given: dict[str, Any] = {"window": window} if window else {}
        given |= {"sink": sink} if sink >= 0 else {}
        given |= {"first": 1} if start is not None else {}
        if steps.strip():
            given |= {"steps": _numbers(steps), "warped": False}
            FlowSchedule().warp(given["steps"])  # checks them
        settings = replace(model.settings, **given).check()
        text = model.text(prompt)
        made = model.stream(settings)
        made.restart(text, seed)
        if start is not None:
            made.give(first_latent(model, start, settings))
        return images(made, frames), State.of(made, model, prompt)


class Steer:
    CATEGORY = "sfmodel"
    FUNCTION = "steer"
    RETURN_TYPES = ("IMAGE", "SFSTREAM")
    RETURN_NAMES = ("images", "stream")
    DESCRIPTION = "The frames that come next, under another prompt."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        about = "Holds from the next chunk on; empty: the stream's own goes on."
        return {
            "required": {
                "stream": ("SFSTREAM",),
                "prompt": ("STRING", {"multiline": True, "default": "", "tooltip": about}),
                "frames": ("INT", FRAMES),
            }
        }

    def steer(self, stream: State, prompt: str, frames: int) -> tuple[Tensor, State]:
        text = stream.model.text(prompt) if prompt.strip() else None
        made, title = stream.stream(), stream.title
        if text is not None:
            made.set_prompt(text)
            title = f"{title} > {prompt}"
        return images(made, frames), State.of(made, stream.model, title)


class SaveState:
    CATEGORY = "sfmodel"
    FUNCTION = "save"
    RETURN_TYPES = ()
    OUTPUT_NODE = True
    DESCRIPTION = "A stream in a file, for Load State or `sfmodel generate --resume`."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"stream": ("SFSTREAM",), "file": ("STRING", STATE)}}

    def save(self, stream: State, file: str) -> dict[str, Any]:
        path = state_file(file)
        notes = {"preset": stream.model.preset, "title": stream.title}
        save_stream(stream.stream(), path, notes)
        return {"ui": {"text": [str(path)]}, "result": ()}


class LoadState:
    CATEGORY = "sfmodel"
    FUNCTION = "load"
    RETURN_TYPES = ("SFSTREAM",)
    RETURN_NAMES = ("stream",)
    DESCRIPTION = "A stream that was saved, to be steered on."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("SFMODEL",), "file": ("STRING", STATE)}}

    @classmethod
    def IS_CHANGED(cls, file: str, **_: Any) -> int:
        return modified(state_file(file))

    def load(self, model: Model, file: str) -> tuple[State]:
        path = state_file(file)
        stream = model.stream(read_preset(path))
        load_stream(stream, path)
        return (State.of(stream, model, str(read_notes(path).get("title", ""))),)


def _numbers(steps: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in steps.replace(",", " ").split())
    except ValueError:
        raise ValueError(f"steps={steps!r}: must be numbers, as 1000 750 500 250") from None


NODE_CLASS_MAPPINGS = {
    "SFModelLoad": LoadModel,
    "SFModelStream": StreamVideo,
    "SFModelSteer": Steer,
    "SFModelSaveState": SaveState,
    "SFModelLoadState": LoadState,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "SFModelLoad": "Load Streaming Model",
    "SFModelStream": "Stream Video",
    "SFModelSteer": "Steer Stream",
    "SFModelSaveState": "Save Stream State",
    "SFModelLoadState": "Load Stream State",
}
