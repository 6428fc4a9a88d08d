"""FLOPs and bytes of the ops, for rooflines. A multiply-add is two FLOPs; a tensor counts once for
each time that it has to be read or written."""

from __future__ import annotations


def attention_flops(
    pairs: int, heads: int, head_dim: int, backward: bool = False, no_gradient: int = 0
) -> int:
    """FLOPs needed for (query, key) pairs that meet: forward two products; backward five, and
    three for the `no_gradient` pairs whose keys take none."""
    products = 5 * pairs - 2 * no_gradient if backward else 2 * pairs
    return 2 * head_dim * heads * products


def attention_bytes(queries: int, keys: int, heads: int, head_dim: int, size: int) -> int:
    """Bytes of q, k, v and o, with elements of `size` bytes."""
    return 2 * (queries + keys) * heads * head_dim * size


def linear_bytes(rows: int, channels: int, outputs: int, size: int) -> int:
    """Bytes of x, the weight and y, with elements of `size` bytes."""
    return (rows * channels + outputs * channels + rows * outputs) * size


def convolution_flops(pixels: int, channels_in: int, channels_out: int, taps: int) -> int:
    """FLOPs of a convolution. pixels: of the output, in all frames; taps: 27 for a 3×3×3 kernel."""
    return 2 * pixels * channels_in * channels_out * taps


def convolution_bytes(
    seen: int, made: int, channels_in: int, channels_out: int, taps: int, size: int
) -> int:
    """Bytes of a convolution that makes `made` pixels of `seen` ones, those of the frames before
    included, and of its weights, with elements of `size` bytes."""
    weights = taps * channels_in * channels_out
    return size * (seen * channels_in + made * channels_out + weights)


def norm_bytes(rows: int, channels: int, tensors: int, size: int) -> int:
    """Bytes of `tensors` activations [rows, channels] with elements of `size` bytes. Modulations
    and weights are a thousandth of that and left out."""
    return rows * channels * tensors * size


def norm_silu_bytes(
    rows: int, before: int, channels: int, size: int, backward: bool = False
) -> int:
    """Bytes of the norm and SiLU before a convolution of the VAE, with a residual: x, y read, their
    sum and the output written, which begins with a copy of `before` rows; backward both gradients
    and the sum read, one gradient written, and those rows are there already."""
    copied = 0 if backward else norm_bytes(before, channels, 2, size)
    return norm_bytes(rows, channels, 4, size) + copied


def quantize_bytes(rows: int, channels: int, size: int) -> int:
    """Bytes of quantising: elements of `size` bytes read, one byte each and a scale a row
    written."""
    return norm_bytes(rows, channels, 1, size + 1) + 4 * rows


def rope_table_bytes(tokens: int, head_dim: int) -> int:
    """Bytes of a cosine and a sine in float32 for each pair of a head's channels."""
    return tokens * head_dim * 4


def qk_norm_rope_bytes(
    tokens: int, channels: int, head_dim: int, size: int, backward: bool = False
) -> int:
    """Bytes of QK-norm and RoPE, with or without the append to a ring, and the table: q, k and v
    read and written; backward dq, dk, dv, q and k read, the three gradients written."""
    tensors = 8 if backward else 6
    return norm_bytes(tokens, channels, tensors, size) + rope_table_bytes(tokens, head_dim)


def sampler_bytes(elements: int, tensors: int) -> int:
    """Bytes of updates of float32 latents. A sampler step reads x and the flow and writes x0 and
    the next x: four tensors where the noise is drawn in the kernel, five where it is given. The DMD
    gradient reads three and writes one."""
    return 4 * tensors * elements


# Floating-point operations for each element of the output (of one of q, k and v for RoPE), counted
# by hand from reference.py. Exponentials, roots and the drawing of noise are left out.
PER_ELEMENT = {
    "rms_norm": 4,  # square, sum, two products
    "rms_norm_silu": 9,  # residual and bias before it; 1 + exp, quotient, product
    "layer_norm": 7,  # two sums, difference, square, two products, shift
    "adaln": 7,
    "gated_layer_norm": 9,  # gate and residual before it
    "gated_adaln": 9,
    "gated_residual": 2,
    "qk_norm_rope": 14,  # of q and of k: the RMSNorm's four, two products and a sum
    "sampler_step": 5,  # x - σ·flow, (1 - σ')·x0 + σ'·ε
    "dmd_gradient": 5,  # two differences, a magnitude, its sum, the quotient
    "quantize_rows": 4,  # a magnitude, the largest, a product, its rounding
    "rope_table": 1,  # the angle
}


def row_flops(op: str, elements: int, backward: bool = False) -> int:
    """FLOPs of an op whose time is that of its bytes; backward about twice as many."""
    return PER_ELEMENT[op] * elements * (2 if backward else 1)
