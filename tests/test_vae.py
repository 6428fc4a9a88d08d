"""Wan2.1's VAE: equal to the recorded and to diffusers' one, and streaming equals whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sfkernels import launch
from sfkernels.launch import Box
from sfmodel.config import VAEConfig
from sfmodel.vae.codec import CausalState
from sfmodel.vae.convolution import channels_last, conv3d
from sfmodel.vae.wan import CausalConv3d, WanVAE, takes
from sfmodel.weights import names
from tests import clips
from tests.clips import assert_same, goes_on_twice, in_parts, last_depends_on
from tests.oracle import DEVICE

RECORDED = Path(__file__).parent / "parity" / "vae_d8"
CONFIG = VAEConfig.from_wan(json.loads((RECORDED / "config.json").read_text()))


def small(impl: str = "auto", tile: int | None = None, conv_impl: str = "auto") -> WanVAE:
    """The recorded one, of width 8."""
    vae = WanVAE(CONFIG, impl, tile, conv_impl)
    vae.load_state_dict(load_file(RECORDED / "weights.safetensors"))
    return vae.requires_grad_(False)


@pytest.fixture(scope="module")
def vae() -> WanVAE:
    return small()


@pytest.fixture(scope="module")
def latents() -> Tensor:
    return clips.latents()


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    return clips.pixels()[:, :21]


@pytest.fixture(scope="module")
def decoded(vae: WanVAE, latents: Tensor) -> tuple[Tensor, CausalState]:
    return vae.decode_chunk(latents)


def test_names_and_shapes_are_the_official_ones(vae: WanVAE) -> None:
    recorded = load_file(RECORDED / "weights.safetensors")
    assert {k: v.shape for k, v in vae.state_dict().items()} == {
        k: v.shape for k, v in recorded.items()
    }


def test_recorded_pixels(vae: WanVAE) -> None:
    case = load_file(RECORDED / "cases.safetensors")
    pixels, _ = vae.decode_chunk(case["decode.z"].transpose(1, 2))
    assert_same(pixels, case["decode.pixels"].transpose(1, 2))


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 1, 1), (1, 3, 2), (3, 3), (2, 4)])
def test_decoding_in_chunks_equals_the_whole(
    vae: WanVAE, latents: Tensor, decoded: tuple[Tensor, CausalState], sizes: tuple[int, ...]
) -> None:
    assert decoded[0].shape == (2, 21, 3, 24, 40)
    assert (decoded[0][0] - decoded[0][1]).abs().max() > 0.1
    assert_same(in_parts(vae.decode_chunk, latents, sizes), decoded)


@pytest.mark.parametrize("sizes", [(1, 4, 4, 4, 4, 4), (5, 16), (9, 8, 4)])
def test_encoding_in_chunks_equals_the_whole(
    vae: WanVAE, pixels: Tensor, sizes: tuple[int, ...]
) -> None:
    whole = vae.encode_chunk(pixels)
    assert whole[0].shape == (2, 6, 16, 3, 5)
    assert (whole[0][0] - whole[0][1]).abs().max() > 0.01
    assert_same(in_parts(vae.encode_chunk, pixels, sizes), whole)


def test_a_clip_goes_on_from_a_state_more_than_once(
    vae: WanVAE, latents: Tensor, pixels: Tensor
) -> None:
    for chunk, parts in (
        (vae.decode_chunk, latents.split(2, 1)),
        (vae.encode_chunk, pixels.split((5, 8, 8), 1)),
    ):
        for frames in goes_on_twice(chunk, parts, apart=0.01).before:
            assert frames.untyped_storage().nbytes() == frames.nbytes


def test_how_far_back_a_frame_looks(vae: WanVAE) -> None:
    assert vae.past_frames == 37
    assert last_depends_on(vae, 37) and not last_depends_on(vae, 38)


# Wider than what a tile's pixels depend on. The outermost latents count for little, so in float64.
@pytest.mark.parametrize(("size", "tile"), [((2, 40), 3), ((33, 2), 20)])
def test_tiles_change_nothing(size: tuple[int, int], tile: int) -> None:
    latents = torch.randn(1, 2, 16, *size, generator=torch.Generator().manual_seed(3))
    want = in_parts(small().double().decode_chunk, latents, (1, 1))[0]
    tiled = small(tile=tile).double()
    assert (in_parts(tiled.decode_chunk, latents, (1, 1))[0] - want).abs().max() < 1e-13
    tiled.decoder.reach -= 1
    assert (in_parts(tiled.decode_chunk, latents, (1, 1))[0] - want).abs().max() > 1e-13


def test_it_equals_diffusers() -> None:
    """Of full width, with the same random weights, decoding (which it clamps) and encoding; in part
    by Winograd, which these sizes are large enough for."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    ours = WanVAE().requires_grad_(False)
    theirs = diffusers.AutoencoderKLWan().requires_grad_(False)
    theirs.load_state_dict(names.diffusers(ours.state_dict()))
    latents, pixels = torch.randn(1, 2, 16, 2, 4), 2 * torch.rand(1, 5, 3, 16, 32) - 1
    mean, std = (torch.tensor(v).view(1, 1, -1, 1, 1)
                 for v in (theirs.config.latents_mean, theirs.config.latents_std))  # fmt: skip
    with torch.no_grad():
        want = theirs.decode((latents * std + mean).transpose(1, 2)).sample.transpose(1, 2)
        got = ours.decode_chunk(latents)[0].clamp(-1, 1)
        assert (got - want).norm() / want.norm() < 1e-5
        want = theirs.encode(pixels.transpose(1, 2)).latent_dist.mean.transpose(1, 2)
        got = ours.encode_chunk(pixels)[0]
        assert (got - (want - mean) / std).norm() / got.norm() < 1e-5


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is for CPU tensors")
def test_kernels_equal_the_reference(
    vae: WanVAE, pixels: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Biases are added by the norms, as on a GPU."""

    def apart(conv: CausalConv3d, x_BTHWC: Tensor) -> tuple[Tensor, Tensor | None]:
        return conv3d(x_BTHWC, conv.weight), conv.bias

    latents = torch.randn(1, 4, 16, 2, 2, generator=torch.Generator().manual_seed(4))
    few = pixels[:1, :5, :, :16, :16]
    want = vae.decode_chunk(latents), vae.encode_chunk(few)
    monkeypatch.setattr(CausalConv3d, "apart", apart)
    for impl in ("triton", "reference"):
        ours = small(impl)
        assert_same(in_parts(ours.decode_chunk, latents, (1, 3)), want[0])
        assert_same(ours.encode_chunk(few), want[1])


def test_a_gradient_reaches_latents_and_weights() -> None:
    """The same as by float64, through every op."""
    latents = torch.randn(1, 2, 16, 2, 3, generator=torch.Generator().manual_seed(5))
    upstream = torch.randn(1, 5, 3, 16, 24, generator=torch.Generator().manual_seed(6))
    found = []
    for dtype in (torch.float32, torch.float64):
        vae, z = small().requires_grad_(True).to(dtype), latents.clone().requires_grad_(True)
        (vae.decode_chunk(z)[0] * upstream).sum().backward()
        assert z.grad is not None
        grads = {k: p.grad for k, p in vae.named_parameters() if p.grad is not None}
        assert grads.keys() == {k for k in grads if k.startswith(("decoder", "conv2"))}
        assert len(grads) == sum(k.startswith(("decoder", "conv2")) for k in vae.state_dict())
        found.append([z.grad, *grads.values()])
    for ours, exact in zip(*found, strict=True):
        assert (ours - exact).norm() < 2e-4 * exact.norm() + 1e-6


def test_half_precision_is_as_close_as_it_can_be(vae: WanVAE, latents: Tensor) -> None:
    half = small().bfloat16()
    want, _ = vae.decode_chunk(latents)
    got, state = half.decode_chunk(latents)
    assert got.dtype == state.before[0].dtype == torch.bfloat16
    assert (got - want).norm() / want.norm() < 0.03


def test_layout_of_weights_changes_nothing(
    latents: Tensor, decoded: tuple[Tensor, CausalState]
) -> None:
    vae = channels_last(small())
    conv = vae.decoder.conv1.weight
    assert conv.is_contiguous(memory_format=torch.channels_last_3d) and not conv.is_contiguous()
    assert_same(vae.decode_chunk(latents), decoded)


def test_by_the_implicit_product(latents: Tensor) -> None:
    """A clip's first chunk and the next one, with each convolution that it is for."""
    vae, latents = channels_last(small()).to(DEVICE), latents[:1, :3].to(DEVICE)
    ours = channels_last(small(conv_impl="triton")).to(DEVICE)
    with launch.using(causal_conv3d_float32=Box(32, 0, 256, 3, 32, 4, 1)):
        got = in_parts(ours.decode_chunk, latents, (1, 2))
    assert_same(got, in_parts(vae.decode_chunk, latents, (1, 2)))
    with pytest.raises(ValueError, match="weight has strides"):
        small(conv_impl="triton").to(DEVICE).decode_chunk(latents)
    assert not takes(ours.decoder.head["2"].get_parameter("weight"))


def test_real_sizes_without_data() -> None:
    """On tensors without values, whatever would ask for one on the host is an error."""
    with torch.device("meta"):
        vae, latents = WanVAE(impl="reference"), torch.empty(1, 3, 16, 60, 104)
    pixels, state = vae.decode_chunk(latents)
    assert pixels.shape == (1, 9, 3, 480, 832)
    pixels, after = vae.decode_chunk(latents, state)
    assert pixels.shape == (1, 12, 3, 480, 832)
    assert [x.shape for x in state.before] == [x.shape for x in after.before]
    encoded, encoder = vae.encode_chunk(pixels[:, :9])
    assert encoded.shape == latents.shape
    assert vae.encode_chunk(pixels, encoder)[0].shape == latents.shape


def test_wrong_sizes_are_refused(vae: WanVAE, latents: Tensor, pixels: Tensor) -> None:
    _, decoder = vae.decode_chunk(latents[:, :1])
    with pytest.raises(ValueError, match=r"latents have shape .*: must be \[B, frames, 16, H,"):
        vae.decode_chunk(latents[:, :, :15])
    with pytest.raises(ValueError, match="latents have 0 frames of 3×5: none may be 0"):
        vae.decode_chunk(latents[:, :0])
    for wrong in (latents[..., :4], latents[:1]):
        with pytest.raises(ValueError, match=r"latents have .*: must be \[2, 3, 5\] as before"):
            vae.decode_chunk(wrong, decoder)
    with pytest.raises(ValueError, match="pixels have 4 frames: at the start of a clip must be 1"):
        vae.encode_chunk(pixels[:, :4])
    with pytest.raises(ValueError, match="24×36: height and width must be multiples of 8"):
        vae.encode_chunk(pixels[..., :36])
    _, encoder = vae.encode_chunk(pixels[:, :1])
    with pytest.raises(ValueError, match="pixels have 3 frames: within of a clip must be 4k"):
        vae.encode_chunk(pixels[:, :3], encoder)
    with pytest.raises(ValueError, match=r"pixels have .*: must be \[2, 24, 40\] as before"):
        vae.encode_chunk(pixels[:1, :4], encoder)
    with pytest.raises(ValueError, match="tile=0: must be at least 1 latent"):
        WanVAE(CONFIG, tile=0)
    with pytest.raises(ValueError, match="norm has triton, cpp, reference"):
        small("fast").decode_chunk(latents)
