"""The video VAEs of `bench decode` and `bench stream`: ours and diffusers', with random weights.

Wan2.1's keep PyTorch's initialisation: norms hold activations near 1, and the last one makes pixels
of standard deviation 0.3, of which hardly any leaves [-1, 1]. TAEHV has no norms: its weights are
He's, smaller where a block adds to its input, and in the last layer such that pixels are alike.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar
from unittest import mock

import torch
from torch import Tensor, nn

from sfmodel.config import VAEConfig
from sfmodel.vae import winograd
from sfmodel.vae.convolution import channels_last
from sfmodel.vae.taehv import MemoryBlock, TinyVAE
from sfmodel.vae.wan import WanVAE
from sfmodel.weights import names

M = TypeVar("M", bound=nn.Module)


def wan_vae(device: torch.device, dtype: torch.dtype, config: VAEConfig | None = None) -> WanVAE:
    with device:
        vae = WanVAE(config)
    return prepared(vae.to(dtype))


def tiny_vae(device: torch.device, dtype: torch.dtype) -> TinyVAE:
    with device:
        vae = TinyVAE()
    for module in vae.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    with torch.no_grad():
        for module in vae.modules():
            if isinstance(module, MemoryBlock):
                module.get_parameter("conv.4.weight").mul_(0.25)
        vae.get_parameter("decoder.22.weight").mul_(0.04)
        vae.get_parameter("decoder.22.bias").fill_(0.5)
    return prepared(vae.to(dtype))


def twin(vae: WanVAE, dtype: torch.dtype, impl: str = "auto", conv_impl: str = "auto") -> WanVAE:
    """The same parameters in `dtype`, not copied where they have it, under an implementation."""
    with torch.device("meta"):
        made = WanVAE(vae.config, impl, conv_impl=conv_impl)
    state = {name: tensor.to(dtype) for name, tensor in vae.state_dict().items()}
    made.load_state_dict(state, assign=True)
    return prepared(made)


def prepared(module: M) -> M:
    """Ready to decode, as `sfmodel.pretrained` leaves it."""
    return channels_last(module).eval().requires_grad_(False)


def searched(search: bool = True) -> contextlib.AbstractContextManager[None]:
    """cuDNN times its algorithms at each size that it meets; and float32 is no TF32."""
    return torch.backends.cudnn.flags(enabled=True, benchmark=search, allow_tf32=False)


@contextlib.contextmanager
def plain(search: bool = True) -> Iterator[None]:
    """The same without Winograd's way on a CPU: PyTorch's own convolutions."""
    with searched(search), mock.patch.object(winograd, "pays", lambda *_: False):
        yield


class WanCodec:
    """diffusers' Wan VAE as a `sfmodel.vae.codec.VideoCodec`, to the same pixels as its own
    `decode` of the whole clip. The state is its cache of features.

    whole: all frames of a chunk but a clip's first in one call of its decoder, which its `decode`
    calls for each. last: channels last. compiled: by torch.compile, the decoder within a clip."""

    def __init__(
        self, vae: Any, whole: bool = False, last: bool = False, compiled: bool = False
    ) -> None:
        self.vae, self.whole = vae, whole
        self.format = torch.channels_last_3d if last else torch.contiguous_format
        self.latent_channels: int = vae.config.z_dim
        shape, like = (1, -1, 1, 1, 1), next(vae.parameters())
        mean, std = torch.tensor([vae.config.latents_mean, vae.config.latents_std])
        self.mean, self.std = mean.view(shape).to(like), std.view(shape).to(like)
        self.within = torch.compile(vae.decoder, dynamic=False) if compiled else vae.decoder

    @torch.no_grad()
    def decode_chunk(self, latents_BFCHW: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        vae, start = self.vae, state is None
        vae.clear_cache()
        cache = vae._feat_map if start else [*state]
        z_BCFHW = latents_BFCHW.transpose(1, 2).to(self.std.dtype) * self.std + self.mean
        z_BCFHW = vae.post_quant_conv(z_BCFHW.contiguous(memory_format=self.format))
        frames = []
        if start:
            options = dict(feat_cache=cache, feat_idx=[0], first_chunk=True)
            frames.append(vae.decoder(z_BCFHW[:, :, :1], **options))
        later = z_BCFHW[:, :, int(start) :]
        for part in later.split(later.shape[2] or 1 if self.whole else 1, 2):
            if part.shape[2]:
                decoder = vae.decoder if start else self.within
                frames.append(decoder(part, feat_cache=cache, feat_idx=[0]))
        return torch.cat(frames, 2).transpose(1, 2).clamp(-1, 1), cache

    @torch.no_grad()
    def encode_chunk(self, pixels_BTCHW: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        vae, start = self.vae, state is None
        vae.clear_cache()
        cache = vae._enc_feat_map if start else [*state]
        x_BCTHW = pixels_BTCHW.transpose(1, 2).to(self.std.dtype)
        x_BCTHW = x_BCTHW.contiguous(memory_format=self.format)
        parts = [*x_BCTHW[:, :, : int(start)].split(1, 2), *x_BCTHW[:, :, int(start) :].split(4, 2)]
        made = [vae.encoder(x, feat_cache=cache, feat_idx=[0]) for x in parts if x.shape[2]]
        z_BCFHW = vae.quant_conv(torch.cat(made, 2))[:, : self.latent_channels]
        return ((z_BCFHW - self.mean) / self.std).transpose(1, 2), cache


def diffusers_vae(official: Mapping[str, Tensor], config: VAEConfig, last: bool) -> Any:
    """With these weights, contiguous or with channels last. Raises what its library raises."""
    library = importlib.import_module("diffusers")
    with torch.device("meta"):
        vae = library.AutoencoderKLWan(
            base_dim=config.dim,
            dim_mult=[*config.multiples],
            num_res_blocks=config.blocks,
            temperal_downsample=[*config.halves_time],
        )
    state = {name: tensor.contiguous() for name, tensor in names.diffusers(official).items()}
    vae.load_state_dict(state, assign=True)
    vae = channels_last(vae) if last else vae
    return vae.eval().requires_grad_(False)
