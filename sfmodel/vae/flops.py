"""FLOPs of the video decoders and of Wan2.1's encoder, from the shapes of their convolutions."""

from __future__ import annotations

from sfkernels.roofline import attention_flops, convolution_flops

# Of each convolution, by its output: count, channels in, channels out, taps, times the latents'
# height and width, times their frames.

# Wan2.1's VAE (dim 96, multiples 1, 2, 4, 4, two and one residual blocks a stage). The 2× up-
# samplings in space halve the channels; those in time double them first and deal them to frames.
# The convolution after an up-sampling counts all its nine taps, unless it is "folded": as four 2×2
# kernels of what is not upsampled it needs four.
WAN_DECODER = (
    (1, 16, 16, 1, 1, 1),
    (1, 16, 384, 27, 1, 1),
    (10, 384, 384, 27, 1, 1),  # two residual blocks of the middle, three of the first stage
    (1, 384, 4 * 384, 1, 1, 1),  # the middle's attention: q, k, v and output
    (1, 384, 768, 3, 1, 1),
    (1, 384, 192, 9, 2, 2),
    (1, 192, 384, 27, 2, 2),
    (1, 192, 384, 1, 2, 2),
    (5, 384, 384, 27, 2, 2),
    (1, 384, 768, 3, 2, 2),
    (1, 384, 192, 9, 4, 4),
    (6, 192, 192, 27, 4, 4),
    (1, 192, 96, 9, 8, 4),
    (6, 96, 96, 27, 8, 4),
    (1, 96, 3, 27, 8, 4),
)
# Of the encoder, by the same measures: four pixel frames make a latent one. Each 2× down-sampling
# in space is a convolution of nine taps, in time one of three.
WAN_ENCODER = (
    (1, 3, 96, 27, 8, 4),
    (4, 96, 96, 27, 8, 4),
    (1, 96, 96, 9, 4, 4),
    (1, 96, 192, 27, 4, 4),
    (1, 96, 192, 1, 4, 4),
    (3, 192, 192, 27, 4, 4),
    (1, 192, 192, 9, 2, 4),
    (1, 192, 192, 3, 2, 2),
    (1, 192, 384, 27, 2, 2),
    (1, 192, 384, 1, 2, 2),
    (3, 384, 384, 27, 2, 2),
    (1, 384, 384, 9, 1, 2),
    (1, 384, 384, 3, 1, 1),
    (8, 384, 384, 27, 1, 1),  # two residual blocks of the last stage, two of the middle
    (1, 384, 4 * 384, 1, 1, 1),
    (1, 384, 32, 27, 1, 1),
    (1, 32, 32, 1, 1, 1),
)
# TAEHV (taew2_1), a distilled one: three blocks a stage, each of three 3×3 convolutions of which
# the first takes its input beside that of the frame before.
TAEHV_DECODER = (
    (1, 16, 256, 9, 1, 1),
    (3, 2 * 256, 256, 9, 1, 1),
    (6, 256, 256, 9, 1, 1),
    (1, 256, 256, 1, 2, 1),
    (1, 256, 128, 9, 2, 1),
    (3, 2 * 128, 128, 9, 2, 1),
    (6, 128, 128, 9, 2, 1),
    (1, 128, 256, 1, 4, 1),  # makes two frames of one
    (1, 128, 64, 9, 4, 2),
    (3, 2 * 64, 64, 9, 4, 2),
    (6, 64, 64, 9, 4, 2),
    (1, 64, 128, 1, 8, 2),  # and again
    (1, 64, 64, 9, 8, 4),
    (1, 64, 3, 9, 8, 4),
)
DECODERS = {"wan": WAN_DECODER, "taehv": TAEHV_DECODER, "none": ()}


def decode_flops(
    decoder: str,
    frames: int,
    height: int,
    width: int,
    first: bool = False,
    folded: bool = False,
    dim: int = 96,
) -> int:
    """FLOPs of decoding `frames` latent frames of height × width latents. first: they begin the
    video; Wan's VAE then makes 1 + 4·(frames − 1) pixel frames, while TAEHV decodes them all and
    drops three. folded: of Wan's VAE with four of nine taps after each up-sampling. dim: its
    channels at full resolution."""
    if decoder != "wan":
        dim, first, folded = 96, False, False
    flops = _vae_attention_flops(frames, height * width, dim) * (decoder == "wan")
    for count, a, b, taps, space, times in DECODERS[decoder]:
        # The convolutions that make two frames of one have three taps and skip the first frame.
        made = times * frames - (times if taps == 3 else times - 1) * first
        taps = 4 if folded and taps == 9 else taps
        a, b = _widened(a, dim), _widened(b, dim)
        flops += count * convolution_flops(made * height * width * space**2, a, b, taps)
    return flops


def encode_flops(frames: int, height: int, width: int, dim: int = 96) -> int:
    """FLOPs of encoding 4 · frames pixel frames after a video's first one to `frames` latent frames
    of height × width by Wan's VAE."""
    flops = _vae_attention_flops(frames, height * width, dim)
    for count, a, b, taps, space, times in WAN_ENCODER:
        made = times * frames * height * width * space**2
        a, b = _widened(a, dim), _widened(b, dim)
        flops += count * convolution_flops(made, a, b, taps)
    return flops


def _widened(channels: int, dim: int) -> int:
    """Channels at another dim than the 96 of the tables above, whose multiples change with it."""
    return channels if channels % 96 else channels * dim // 96


def _vae_attention_flops(frames: int, latents: int, dim: int) -> int:
    """FLOPs of attention inside each latent frame, one head."""
    return attention_flops(frames * latents**2, 1, 4 * dim)
