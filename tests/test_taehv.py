"""The tiny codec of Wan2.1's latents: equal to the recorded one, and streaming equals whole."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sfmodel.vae.codec import CausalState
from sfmodel.vae.taehv import TinyVAE
from tests import clips
from tests.clips import assert_same, goes_on_twice, in_parts, last_depends_on
from tests.parity.__main__ import drawn_weights

RECORDED = Path(__file__).parent / "parity" / "taehv_seed0"
CONFIG = json.loads((RECORDED / "config.json").read_text())


@pytest.fixture(scope="module")
def vae() -> TinyVAE:
    vae = TinyVAE().requires_grad_(False)
    vae.load_state_dict(drawn_weights(CONFIG))
    return vae


@pytest.fixture(scope="module")
def latents() -> Tensor:
    return clips.latents()


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    return clips.pixels()


@pytest.fixture(scope="module")
def decoded(vae: TinyVAE, latents: Tensor) -> tuple[Tensor, CausalState]:
    return vae.decode_chunk(latents)


def test_names_and_shapes_are_the_public_ones(vae: TinyVAE) -> None:
    ours = {name: [*weight.shape] for name, weight in vae.state_dict().items()}
    assert ours == CONFIG["keys"]
    assert list(ours) == list(CONFIG["keys"])


def test_recorded_pixels_and_latents(vae: TinyVAE) -> None:
    cases = load_file(RECORDED / "cases.safetensors")
    decoded, _ = vae.decode_chunk(cases["decode.z"])
    assert_same(decoded, 2 * cases["decode.pixels"] - 1)
    encoded, _ = vae.encode_chunk(2 * cases["encode.pixels"] - 1)
    assert_same(encoded, cases["encode.z"])


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 1, 1), (1, 3, 2), (3, 3), (4, 1, 1)])
def test_decoding_in_chunks_equals_the_whole(
    vae: TinyVAE,
    latents: Tensor,
    decoded: tuple[Tensor, CausalState],
    sizes: tuple[int, ...],
) -> None:
    assert decoded[0].shape == (2, 21, 3, 24, 40)
    assert (decoded[0][0] - decoded[0][1]).abs().max() > 0.5
    assert_same(in_parts(vae.decode_chunk, latents, sizes), decoded)


@pytest.mark.parametrize("sizes", [(4, 4, 4, 4, 4, 4), (12, 4, 8), (1, 4, 12, 4), (9, 12)])
def test_encoding_in_chunks_equals_the_whole(
    vae: TinyVAE, pixels: Tensor, sizes: tuple[int, ...]
) -> None:
    pixels = pixels[:, : sum(sizes)]
    whole = vae.encode_chunk(pixels)
    assert whole[0].shape == (2, 6, 16, 3, 5)
    assert (whole[0][0] - whole[0][1]).abs().max() > 0.1
    assert_same(in_parts(vae.encode_chunk, pixels, sizes), whole)


def test_a_still_is_a_group_of_four(vae: TinyVAE, pixels: Tensor) -> None:
    still = pixels[:, :1]
    grouped = torch.cat([still, still, still, pixels[:, :5]], 1)
    assert_same(vae.encode_chunk(pixels[:, :5]), vae.encode_chunk(grouped))


def test_a_clip_is_the_same_in_any_batch(
    vae: TinyVAE, latents: Tensor, decoded: tuple[Tensor, CausalState], pixels: Tensor
) -> None:
    assert_same(vae.decode_chunk(latents[1:])[0], decoded[0][1:])
    assert_same(vae.encode_chunk(pixels[1:])[0], vae.encode_chunk(pixels)[0][1:])


def test_a_clip_goes_on_from_a_state_more_than_once(
    vae: TinyVAE, latents: Tensor, pixels: Tensor
) -> None:
    goes_on_twice(vae.decode_chunk, latents.split(2, 1), apart=0.1)
    goes_on_twice(vae.encode_chunk, pixels.split(8, 1), apart=0.1)


def test_how_far_back_a_frame_looks(vae: TinyVAE) -> None:
    assert vae.past_frames == 7
    assert last_depends_on(vae, 7) and not last_depends_on(vae, 8)


def test_a_state_holds_its_frames_alone(vae: TinyVAE, latents: Tensor, pixels: Tensor) -> None:
    for chunk, x in ((vae.decode_chunk, latents), (vae.encode_chunk, pixels)):
        mine = x.clone()
        out, state = chunk(mine)
        kept = [frame.clone() for frame in state.before]
        mine.zero_()
        out.zero_()
        assert all(map(torch.equal, state.before, kept))
        assert len(kept) == 9
        for frame in state.before:
            assert frame.untyped_storage().nbytes() == frame.nbytes


def test_pixels_are_clamped_and_of_the_weights_dtype(vae: TinyVAE, latents: Tensor) -> None:
    half = TinyVAE().requires_grad_(False)
    half.load_state_dict(vae.state_dict())
    half.bfloat16()
    want, _ = vae.decode_chunk(4 * latents)
    got, state = half.decode_chunk(4 * latents)
    assert got.dtype == state.before[0].dtype == torch.bfloat16
    assert got.min() == want.min() == -1
    assert got.max() == want.max() == 1
    assert (got - want).norm() / want.norm() < 0.03
    encoded, _ = half.encode_chunk(want)
    assert encoded.dtype == torch.bfloat16
    wanted, _ = vae.encode_chunk(want)
    assert (encoded - wanted).norm() / wanted.norm() < 0.03


def test_real_sizes_without_data() -> None:
    """On tensors without values, whatever would ask for one on the host is an error."""
    with torch.device("meta"):
        vae, latents = TinyVAE(), torch.empty(1, 3, 16, 60, 104)
    pixels, state = vae.decode_chunk(latents)
    assert pixels.shape == (1, 9, 3, 480, 832)
    pixels, _ = vae.decode_chunk(latents, state)
    assert pixels.shape == (1, 12, 3, 480, 832)
    encoded, encoder = vae.encode_chunk(pixels[:, :9])
    assert encoded.shape == latents.shape
    assert vae.encode_chunk(pixels, encoder)[0].shape == latents.shape


def test_wrong_sizes_are_refused(vae: TinyVAE, latents: Tensor, pixels: Tensor) -> None:
    decoder, encoder = CausalState((torch.zeros(2, 1, 3, 5, 256),)), CausalState(())
    for wrong in (latents[:, :, :15], latents[0]):
        with pytest.raises(ValueError, match=r"latents have shape .*: must be \[B, frames, 16, H,"):
            vae.decode_chunk(wrong)
    with pytest.raises(ValueError, match="latents have 0 frames of 3×5: none may be 0"):
        vae.decode_chunk(latents[:, :0])
    for wrong in (latents[..., :4], latents[:1]):
        with pytest.raises(ValueError, match=r"latents have .*: must be \[2, 3, 5\] as before"):
            vae.decode_chunk(wrong, decoder)
    for wrong in (pixels[:, :, :2], pixels[0], pixels[0, 0, 0]):
        with pytest.raises(ValueError, match=r"pixels have shape .*: must be \[B, frames, 3, H, W"):
            vae.encode_chunk(wrong)
    for frames in (2, 3, 6):
        with pytest.raises(ValueError, match=rf"pixels have {frames} frames: at the start of"):
            vae.encode_chunk(pixels[:, :frames])
    for frames in (0, 1, 5):
        with pytest.raises(ValueError, match=rf"pixels have {frames} frames: within of a clip"):
            vae.encode_chunk(pixels[:, :frames], encoder)
    with pytest.raises(ValueError, match="24×36: height and width must be multiples of 8"):
        vae.encode_chunk(pixels[..., :36])
    _, encoder = vae.encode_chunk(pixels[:, :4])
    for wrong in (pixels[..., :32], pixels[:1]):
        with pytest.raises(ValueError, match=r"pixels have .*: must be \[2, 24, 40\] as before"):
            vae.encode_chunk(wrong, encoder)


def test_it_needs_torch_alone() -> None:
    code = "import sys, sfmodel.vae.taehv; print({'safetensors', 'sfkernels'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.gpu
def test_a_cuda_graph_holds_a_chunk(vae: TinyVAE, latents: Tensor, pixels: Tensor) -> None:
    on_gpu = TinyVAE().requires_grad_(False)
    on_gpu.load_state_dict(vae.state_dict())
    on_gpu.cuda()
    for chunk, first, second in (
        (on_gpu.decode_chunk, *latents.cuda().split(3, 1)),
        (on_gpu.encode_chunk, *pixels.cuda().split(12, 1)),
    ):
        _, state = chunk(first)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):  # warms up what cuDNN chooses and allocates
            chunk(torch.zeros_like(second), state)
        torch.cuda.synchronize()
        static, graph = torch.zeros_like(second), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            out, _ = chunk(static, state)
        static.copy_(second)
        graph.replay()
        assert_same(out, chunk(second, state)[0])
