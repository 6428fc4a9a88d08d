"""3×3×3 convolutions on a CPU by Winograd's minimal filtering, F(4×4, 3×3) (Lavin and Gray, arXiv
1509.09308): a quarter of the products, which is what a convolution waits for there.

A frame is cut into tiles of 6×6 pixels, four apart; tiles and kernel are transformed, multiplied
entry by entry (36 matrix products over channels), summed over the taps in time and transformed back
to 4×4 pixels. A frame's tiles are transformed once for all three taps. In float32 it is some three
times as far from the exact result as the direct way, 3e-6 against 1e-6.

Shapes: B batch, T frames, H × W pixels, C and O channels in and out, X = 36 entries of a tile, N
tiles of a frame.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

OUT, IN = 4, 6  # pixels on a side of a tile
TOGETHER = 4096  # tiles of as many frames as are computed at once
# Below, transforming the kernel takes longer than what is saved. The frames do not count, so that a
# clip is computed in the same way in chunks of any size.
FEWEST_CHANNELS, FEWEST_PIXELS = 32, 256


def _both_sides(matrix: list[list[float]]) -> Tensor:
    """The transform of rows and columns of a tile, as one matrix over its entries."""
    one = torch.tensor(matrix, dtype=torch.float64, device="cpu")
    return torch.kron(one, one).float()


_INPUT = _both_sides(
    [
        [4, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ]
)
_KERNEL = _both_sides(
    [
        [1 / 4, 0, 0],
        [-1 / 6, -1 / 6, -1 / 6],
        [-1 / 6, 1 / 6, -1 / 6],
        [1 / 24, 1 / 12, 1 / 6],
        [1 / 24, -1 / 12, 1 / 6],
        [0, 0, 1],
    ]
)
_OUTPUT = _both_sides(
    [
        [1, 1, 1, 1, 1, 0],
        [0, 1, -1, 2, -2, 0],
        [0, 1, 1, 4, 4, 0],
        [0, 1, -1, 8, -8, 1],
    ]
)


def pays(x_BTHWC: Tensor, weight: Tensor) -> bool:
    """Tells whether `conv3d` takes these and is faster than the direct way."""
    return (
        x_BTHWC.device.type == "cpu"
        and x_BTHWC.dtype == weight.dtype == torch.float32
        and not (torch.is_grad_enabled() and (x_BTHWC.requires_grad or weight.requires_grad))
        and weight.shape[-2:] == (3, 3)
        and min(weight.shape[:2]) >= FEWEST_CHANNELS
        and x_BTHWC.shape[2] * x_BTHWC.shape[3] >= FEWEST_PIXELS
    )


def conv3d(x_BTHWC: Tensor, weight: Tensor, bias_O: Tensor | None) -> Tensor:
    """Convolution of x [B, T, H, W, C] and weight [O, C, taps, 3, 3], with one pixel of zeros
    around each frame and none in time: [B, T − taps + 1, H, W, O]. Has no gradient."""
    B, T, H, W, C = x_BTHWC.shape
    outputs, _, taps = weight.shape[:3]
    rows, columns = -(-H // OUT), -(-W // OUT)
    weight_OK9C = weight.permute(0, 2, 3, 4, 1).reshape(outputs, taps, 9, C)
    kernels_XCO = [(_KERNEL @ weight_OK9C[:, k]).permute(1, 2, 0) for k in range(taps)]
    out = x_BTHWC.new_empty(B, T - taps + 1, rows * OUT, columns * OUT, outputs)
    margin = (0, 0, 1, 1 + columns * OUT - W, 1, 1 + rows * OUT - H)
    for x_THWC, out_THWO in zip(x_BTHWC, out, strict=True):
        for first, seen_XNC in _groups(F.pad(x_THWC, margin), taps, rows * columns):
            sum_XNO = torch.bmm(seen_XNC[0], kernels_XCO[0])
            for tile, kernel in zip(seen_XNC[1:], kernels_XCO[1:], strict=True):
                sum_XNO.baddbmm_(tile, kernel)
            count = sum_XNO.shape[1] // (rows * columns)
            pixels = (_OUTPUT @ sum_XNO.view(IN * IN, -1)).view(OUT, OUT, count, rows, columns, -1)
            place = out_THWO[first : first + count].view(count, rows, OUT, columns, OUT, -1)
            bias = 0.0 if bias_O is None else bias_O
            torch.add(pixels.permute(2, 3, 0, 4, 1, 5), bias, out=place)
    return out[:, :, :H, :W].contiguous()


def _groups(x_THWC: Tensor, taps: int, tiles: int) -> Iterator[tuple[int, list[Tensor]]]:
    """The first of one or more frames that are computed together, and for each tap in time the
    transformed tiles [X, frames·N, C] that it sees: small frames all at once, which makes larger
    matrix products, others one by one, which takes less memory."""
    T = len(x_THWC)
    if T * tiles <= TOGETHER:
        all_XTNC = _transformed(x_THWC).unflatten(1, (T, -1))
        yield 0, [all_XTNC[:, k : k + T - taps + 1].flatten(1, 2) for k in range(taps)]
        return
    seen: list[Tensor] = []
    for t in range(T):
        seen = [*seen, _transformed(x_THWC[t : t + 1])][-taps:]
        if len(seen) == taps:
            yield t + 1 - taps, seen


def _transformed(x_THWC: Tensor) -> Tensor:
    """The tiles [X, T·N, C] of padded frames."""
    tiles_TrcCij = x_THWC.unfold(1, IN, OUT).unfold(2, IN, OUT)
    x_XNC = tiles_TrcCij.permute(4, 5, 0, 1, 2, 3).reshape(IN * IN, -1)
    return (_INPUT @ x_XNC).view(IN * IN, -1, x_THWC.shape[-1])
