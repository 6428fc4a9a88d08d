"""The models, prompts and decoders that `bench stream`, `bench train` and the experiment on rolling
caches run: at full size with random weights, at toy size the shipped ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bench import codecs, peers, timing
from sfmodel.config import PRESETS, DiTConfig, Preset
from sfmodel.dit import DiT
from sfmodel.vae.codec import VideoDecoder

PROMPT = "a large red ball moves up slowly"


@dataclass(frozen=True)
class StreamInputs:
    """The parts that all variants share. model: its weights. text [1, T, text_dim]: the prompt's
    embeddings, and `encode` what computes them. tiny: a second decoder, to be timed beside `codec`.
    notes: whose these are, or why there are none."""

    preset: Preset
    model: DiT
    text_BTE: Tensor
    codec: VideoDecoder
    encode: Callable[[], Tensor] | None = None
    tiny: VideoDecoder | None = None
    notes: tuple[str, ...] = ()


def random_model(config: DiTConfig, device: torch.device) -> DiT:
    """A model in float32. Wan2.1 begins with a head of zeros, whose output hides errors and whose
    gradient stops there; this one's flow has about unit variance."""
    with device:
        model = DiT(config)
    nn.init.normal_(model.head.head.weight, std=config.dim**-0.5)
    return model


def full_size(device: torch.device) -> StreamInputs:
    """Random weights. The text encoder is that of transformers, where it is installed."""
    preset = PRESETS["wan-1.3b"]
    config = preset.dit
    torch.manual_seed(0)
    model = random_model(config, device).to(torch.bfloat16).eval()
    text_BTE = torch.randn(1, config.text_len, config.text_dim, device=device)
    codec = codecs.wan_vae(device, torch.bfloat16)
    tiny = codecs.tiny_vae(device, torch.bfloat16)
    encode: Callable[[], Tensor] | None = None
    notes = ["decoded by Wan2.1's VAE, beside it by TAEHV"]
    try:
        encode = peers.text_encoder(device, config.text_len)
        notes.append("text encoded by transformers' UMT5")
    except Exception as error:  # not installed, of another version, out of memory
        notes.append(f"no text encoder here: {timing.reason(error)}")
    return StreamInputs(preset, model, text_BTE, codec, encode, tiny, tuple(notes))


def toy() -> StreamInputs:
    """The shipped toy model. Raises ValueError where what loads it is not installed."""
    try:
        from sfmodel.pretrained import load_toy
    except ImportError as error:
        raise ValueError(f"the toy model needs {error.name}, of the extra 'model'") from error
    model, codec, text = load_toy()

    def encode() -> Tensor:
        return text([PROMPT], model.device)

    return StreamInputs(PRESETS["toy"], model, encode(), codec, encode)


def shared(model: DiT, impl: str, attention: str, linear: str = "auto") -> DiT:
    """The same parameters, not copies, under other implementations."""
    with torch.device("meta"):
        twin = DiT(model.config, impl, attention, linear)
    twin.load_state_dict(model.state_dict(), assign=True)
    return twin.eval()
