"""The codec of the toy world: streaming equals whole, and what comes back is what went in."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sfmodel.toy import vae as toy_vae
from sfmodel.toy import world
from sfmodel.toy.vae import DecoderState, EncoderState, ToyVAE
from tests.clips import last_depends_on


@pytest.fixture(scope="module")
def vae() -> ToyVAE:
    return ToyVAE.from_pretrained()


@pytest.fixture(scope="module")
def sample() -> world.Sample:
    return world.sample(16, 25, seed=1234)


def psnr(a: Tensor, b: Tensor) -> float:
    return 10 * math.log10(4 / float((a - b).square().mean()))


def streamed(vae: ToyVAE, pixels_BTCHW: Tensor, chunks: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Latents and pixels of a clip that went through in chunks of so many latent frames."""
    encoder: EncoderState | None = None
    decoder: DecoderState | None = None
    latents, pixels = [], []
    with torch.no_grad():
        for part in pixels_BTCHW.split([4 * c - (i == 0) * 3 for i, c in enumerate(chunks)], dim=1):
            latent, encoder = vae.encode_chunk(part, encoder)
            pixel, decoder = vae.decode_chunk(latent, decoder)
            assert pixel.shape == part.shape
            latents.append(latent)
            pixels.append(pixel)
            assert encoder.frames == sum(p.shape[1] for p in pixels)
    return torch.cat(latents, dim=1), torch.cat(pixels, dim=1)


@pytest.mark.parametrize("chunks", [(1, 1, 1, 1, 1, 1, 1), (1, 3, 3), (3, 3, 1), (2, 5)])
@pytest.mark.parametrize("size", [(64, 64), (24, 40)])
def test_chunks_equal_the_whole(
    vae: ToyVAE, sample: world.Sample, chunks: tuple[int, ...], size: tuple[int, int]
) -> None:
    pixels_BTCHW = sample.pixels_BTCHW[:2, :, :, : size[0], : size[1]]
    latents, decoded = streamed(vae, pixels_BTCHW, chunks)
    whole_latents, whole_decoded = streamed(vae, pixels_BTCHW, (7,))
    assert whole_latents.shape == (2, 7, 4, size[0] // 8, size[1] // 8)
    assert torch.equal(latents, whole_latents)
    # A convolution may sum in another order for another number of frames.
    torch.testing.assert_close(decoded, whole_decoded, rtol=0, atol=1e-5)
    assert (whole_decoded[0] - whole_decoded[1]).abs().max() > 0.5


def test_a_clip_is_decoded_alike_in_any_batch(vae: ToyVAE, sample: world.Sample) -> None:
    together = streamed(vae, sample.pixels_BTCHW[:3], (3, 4))
    alone = streamed(vae, sample.pixels_BTCHW[2:3], (3, 4))
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a[2:3], b, rtol=0, atol=1e-5)


def test_the_state_does_not_share_memory_with_the_latents(vae: ToyVAE) -> None:
    latents = vae.sample_latents(1, 2, seed=0).latents_BFCHW
    _, state = vae.decode_chunk(latents)
    kept = state.last_BCHW.clone()
    latents.zero_()
    assert torch.equal(state.last_BCHW, kept)


def test_the_future_does_not_change_the_past(vae: ToyVAE, sample: world.Sample) -> None:
    pixels = sample.pixels_BTCHW[:1].clone()
    latents, decoded = streamed(vae, pixels, (7,))
    pixels[:, 13:] = -pixels[:, 13:]
    changed_latents, changed = streamed(vae, pixels, (7,))
    assert torch.equal(latents[:, :4], changed_latents[:, :4])
    torch.testing.assert_close(decoded[:, :13], changed[:, :13], rtol=0, atol=1e-5)
    assert (latents[:, 4] - changed_latents[:, 4]).abs().max() > 1
    assert (decoded[:, 13] - changed[:, 13]).abs().max() > 0.1


def test_how_far_back_a_frame_looks(vae: ToyVAE) -> None:
    assert vae.past_frames == 1
    assert last_depends_on(vae, 1) and not last_depends_on(vae, 2)


def test_latents_are_block_means_and_their_motion(vae: ToyVAE) -> None:
    level_T = torch.tensor([0.1, -0.4, -0.2, 0.0, 0.2])
    pixels = level_T[None, :, None, None, None].expand(1, 5, 3, 8, 8).clone()
    pixels[:, :, 0] += 0.3
    latents, _ = vae.encode_chunk(pixels)
    raw_FC = (latents * vae.std_C11 + vae.mean_C11)[0, :, :, 0, 0]
    want = torch.tensor([[0.4, 0.1, 0.1, 0.0], [0.2, -0.1, -0.1, 0.6]])
    torch.testing.assert_close(raw_FC, want, rtol=0, atol=1e-6)


def test_latents_have_zero_mean_and_unit_variance(vae: ToyVAE) -> None:
    latents_BFCHW = vae.sample_latents(600, 2, seed=99).latents_BFCHW[:, 1:]
    over_C = (0, 1, 3, 4)
    assert latents_BFCHW.mean(over_C).abs().max() < 0.08
    assert (latents_BFCHW.std(over_C) - 1).abs().max() < 0.08


def test_latents_without_rendering_are_those_of_the_pixels(vae: ToyVAE) -> None:
    sample = world.sample(5, 17, seed=4, drop=0.3, empty=0.2)
    fast = vae.sample_latents(5, 5, seed=4, drop=0.3, empty=0.2)
    torch.testing.assert_close(
        fast.latents_BFCHW, vae.encode_chunk(sample.pixels_BTCHW)[0], rtol=0, atol=1e-4
    )
    assert fast.sentences == sample.sentences
    assert torch.equal(fast.truth.position_BT2, sample.truth.position_BT2)


@pytest.mark.parametrize(("sigma", "bound"), [(0.0, 38.0), (0.1, 36.5)])
def test_a_round_trip_keeps_the_ball(
    vae: ToyVAE, sample: world.Sample, sigma: float, bound: float
) -> None:
    latents, _ = vae.encode_chunk(sample.pixels_BTCHW)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        decoded, _ = vae.decode_chunk(latents + sigma * noise)
    assert psnr(decoded, sample.pixels_BTCHW) > bound
    assert decoded.min() > -1.1
    assert decoded.max() <= 1
    measured, truth = world.measure(decoded), sample.truth
    assert measured.clean_BT.float().mean() > 0.99
    assert (measured.colour_BT == truth.colour_B[:, None]).all()
    # The largest errors are where a ball bounces between two sub-frames.
    error_BT = (measured.position_BT2 - truth.position_BT2).norm(dim=-1)
    assert error_BT.mean() < 0.2
    assert error_BT.max() < 2.5
    assert (measured.radius_BT - truth.radius_B[:, None]).abs().mean() < 0.15


def test_the_still_is_the_first_pixel_frame(vae: ToyVAE) -> None:
    pixels_BTCHW = world.sample(64, 1, seed=1234).pixels_BTCHW
    _, decoded = streamed(vae, pixels_BTCHW, (1,))
    assert psnr(decoded, pixels_BTCHW) > 39


def test_wrong_sizes_are_refused(vae: ToyVAE) -> None:
    clip, state = torch.zeros(1, 5, 3, 16, 16), EncoderState(1)
    for frames in (0, 2, 4):
        with pytest.raises(ValueError, match=rf"{frames} frames: at the start .* 1 \+ 4k"):
            vae.encode_chunk(clip[:, :frames])
    for frames in (0, 1, 5):
        with pytest.raises(ValueError, match=rf"{frames} frames: within .* 4k, k >= 1"):
            vae.encode_chunk(clip[:, :frames], state)
    with pytest.raises(ValueError, match="16×12: height and width must be multiples of 8"):
        vae.encode_chunk(clip[..., :12])
    with pytest.raises(ValueError, match=r"must be \[B, frames, 3, H, W\]"):
        vae.encode_chunk(clip[:, :, :2])
    latents = torch.zeros(2, 1, 4, 2, 2)
    with pytest.raises(ValueError, match=r"must be \[B, frames, 4, H, W\]"):
        vae.decode_chunk(latents[:, :, :3])
    with pytest.raises(ValueError, match="none may be 0"):
        vae.decode_chunk(latents[:, :0])
    with pytest.raises(ValueError, match=r"must be \[1, 4, 2, 2\] as before"):
        vae.decode_chunk(latents, vae.decode_chunk(latents[:1])[1])


def test_training_writes_weights_that_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "vae.safetensors"
    with pytest.raises(ValueError, match="no such weights"):
        ToyVAE.from_pretrained(path)
    weights = []
    for steps in ("1", "1", "2"):
        monkeypatch.setattr("sys.argv", ["toy_vae", "--steps", steps, "--out", str(path)])
        toy_vae.main()
        weights.append(ToyVAE.from_pretrained(path).stem.weight)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert "step     2/2  PSNR" in capsys.readouterr().out


def test_shipped_weights_are_small() -> None:
    assert toy_vae.WEIGHTS.stat().st_size < 1.5e6
