"""Sizes of models and the named presets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from sfkernels.arguments import check_positive
from sfkernels.layout import check_positions, check_window


@dataclass(frozen=True)
class DiTConfig:
    """Sizes of a Wan2.1 diffusion transformer.

    patch: (frames, height, width) of latents that make one token; frames must be 1.
    prediction: what the network's last layer stands for. "flow" is ε − x0, as Wan2.1; "x0" is the
        clean latents, which a very small network learns better. The model returns flow either way.
    """

    dim: int
    ffn_dim: int
    heads: int
    layers: int
    channels: int = 16
    patch: tuple[int, int, int] = (1, 2, 2)
    freq_dim: int = 256
    text_dim: int = 4096
    text_len: int = 512
    eps: float = 1e-6
    prediction: Literal["flow", "x0"] = "flow"

    def __post_init__(self) -> None:
        if self.patch[0] != 1:
            raise ValueError(
                f"patch={self.patch}: a token spans one latent frame, so it must be (1, h, w)"
            )
        if self.dim % self.heads or self.head_dim % 2:
            raise ValueError(f"dim={self.dim}: must divide into {self.heads} heads of even size")

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @classmethod
    def from_wan(cls, config: Mapping[str, Any]) -> DiTConfig:
        """Sizes from the names of the official `config.json`. Raises ValueError for a variant whose
        arithmetic differs (image-to-video, no QK-norm, other input and output channels)."""
        fixed = {"model_type": "t2v", "qk_norm": True, "cross_attn_norm": True}
        for name, want in fixed.items():
            if config.get(name, want) != want:
                raise ValueError(f"config.json has {name}={config[name]!r}: must be {want!r}")
        if config["in_dim"] != config["out_dim"]:
            raise ValueError(
                f"config.json has in_dim={config['in_dim']}: must be out_dim={config['out_dim']}"
            )
        patch = config.get("patch_size", (1, 2, 2))
        return cls(
            dim=config["dim"],
            ffn_dim=config["ffn_dim"],
            heads=config["num_heads"],
            layers=config["num_layers"],
            channels=config["in_dim"],
            patch=(patch[0], patch[1], patch[2]),
            freq_dim=config["freq_dim"],
            text_dim=config.get("text_dim", 4096),
            text_len=config["text_len"],
            eps=config["eps"],
        )


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of a Wan2.1 video VAE.

    dim: channels at full resolution; multiples: of them at each level, from full resolution down,
    with half the height and width from one to the next. blocks: residual blocks of a level of the
    encoder; the decoder has one more. halves_time: where a level's end also halves the frames.
    """

    dim: int = 96
    channels: int = 16
    multiples: tuple[int, ...] = (1, 2, 4, 4)
    blocks: int = 2
    halves_time: tuple[bool, ...] = (False, True, True)

    @classmethod
    def from_wan(cls, config: Mapping[str, Any]) -> VAEConfig:
        """Sizes from the names of the official constructor, or of diffusers' `config.json`. Raises
        ValueError for a variant whose arithmetic differs (attention between levels, dropout)."""
        for name in ("attn_scales", "dropout"):
            if config.get(name):
                raise ValueError(f"config.json has {name}={config[name]!r}: must be 0 or empty")
        return cls(
            dim=config["base_dim"] if "base_dim" in config else config["dim"],
            channels=config["z_dim"],
            multiples=tuple(config["dim_mult"]),
            blocks=config["num_res_blocks"],
            halves_time=tuple(config["temperal_downsample"]),
        )


@dataclass(frozen=True)
class Preset:
    """A model with the settings it streams at.

    height, width: of the latents. shift, steps: noise schedule and few-step list. warped: the steps
    are taken as they are, instead of shifted as the schedule is (CausVid's). chunk, first,
    window, sink: latent frames; `first` is the size of the first chunk if it differs from `chunk`
    (1: an independent first frame). positions: of the sink, "absolute" or "relative" to the window,
    as of `sfkernels.RingKVCache`. fps: pixel frames a second of the video.
    """

    dit: DiTConfig
    height: int
    width: int
    shift: float = 5.0
    steps: tuple[int, ...] = (1000, 750, 500, 250)
    warped: bool = False
    chunk: int = 3
    first: int | None = None
    window: int = 21
    sink: int = 0
    positions: str = "relative"
    fps: int = 16

    def check(self) -> Preset:
        """The preset itself. Raises ValueError for sizes that do not fit together."""
        for name in ("height", "width", "chunk", "first"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
        check_positive("shift", self.shift)
        check_window(self.window, self.sink, max(self.chunk, self.first or 1))
        check_positions(self.positions)
        return self

    @property
    def grid(self) -> tuple[int, int]:
        """(height, width) of a frame in tokens."""
        _, ph, pw = self.dit.patch
        return self.height // ph, self.width // pw


PRESETS = {
    "toy": Preset(
        DiTConfig(
            dim=128,
            ffn_dim=512,
            heads=2,
            layers=4,
            channels=4,
            patch=(1, 4, 4),
            freq_dim=64,
            text_dim=32,
            text_len=16,
            prediction="x0",
        ),
        height=8,
        width=8,
        shift=6.0,
        # σ = 1, 0.88, 0.67, 0.4: of the lists tried, the one with the most clean first frames.
        steps=(1000, 550, 250, 100),
        first=1,
        window=9,
    ),
    "wan-1.3b": Preset(DiTConfig(1536, 8960, 12, 30), height=60, width=104),
    "wan-14b": Preset(DiTConfig(5120, 13824, 40, 40), height=60, width=104),
}


def check_seed(seed: int, videos: int = 1) -> None:
    """Raises ValueError where the seeds of so many videos, from this one on, do not fit into the 64
    bits that the noise is drawn from."""
    if not -(2**63) <= seed < 2**63 - videos:
        raise ValueError(f"seed={seed}: must be at least -2**63 and less than 2**63 - {videos}")
