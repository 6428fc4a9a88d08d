"""The convolutions of a video VAE as matrix products, whose operands are never copied: the causal
one over time, and the four 2×2 ones that upsample, each of which writes its quarter of the pixels.

Shapes: B batch, T frames of x and t of the output, H × W pixels, C channels in, O channels out,
S × Y × X taps in time, height and width; of a tile, P pixels of a box BH × BW, K channels in and
N channels out.

The product is out [O, pixels] = weight [O, taps·C] × x [taps·C, pixels]. The weights are that
matrix as they lie in memory. For one tap, x of a box of pixels is the same box moved by the tap: a
load of TMA, which gives zeros beyond the frame and so pads it, or, before sm_90, of pointers. With
the pixels as columns both operands go from TMA through shared memory to the tensor cores; as rows
they would pass through registers, for that is where Triton flattens a box.

O need not be a power of two: 192 channels are a tile of 128 and one of 64 that share the boxes. For
96 a tile of 128 spends a quarter of its time on nothing: 64 and 32 would be 64 and 64, the fewest
rows of a product on Hopper. Frames of the output that follow each other share boxes where that is
set, for a frame of x is seen by three of them: 96 channels ask more of L2 than it gives else.

Floating-point operations: 2·B·t·H·W·O·C·taps. Bytes: x, weights and output once. From L2, for each
operation, 1/N bytes of x (where F frames share boxes, (F + 2) / 3F of that) and 1/FP of weights,
at 16 bits an element. Wan2.1 in bfloat16, a chunk of 12 frames, at the 790 TFLOP/s that an H200
multiplies matrices and the 4.3 TB/s it copies:

    480×832, 96 channels     2.38 TFLOP   3.02 ms   2.0 GB   0.46 ms
    240×416, 192 channels    2.38 TFLOP   3.02 ms   1.0 GB   0.23 ms
    to 480×832 and 96        0.71 TFLOP   0.89 ms   1.4 GB   0.32 ms

Tiles that share a box run side by side, and then those of neighbouring boxes, so that boxes come
from L2, and weights, 8 MB at most, stay there. Not measured on a GPU yet.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from sfkernels import launch
from sfkernels.gpu.attention import dot

HAS_TMA = 90  # the first architecture with it
WEIGHTS = 32  # pixels whose work weighs as much as what programs do whatever their size
FEWEST_COLUMNS = 8  # of a box: so many rows of shared memory swizzle together


@triton.jit
def _load_box(x, batch, frame, row, column, channel, stride_b, stride_t, stride_h, stride_w, height,
              width, TMA: tl.constexpr, C: tl.constexpr, K: tl.constexpr, BH: tl.constexpr,
              BW: tl.constexpr):  # fmt: skip
    """Channels of the pixels of a box [K, P], zeros beyond the frame."""
    if TMA:
        x_PK = x.load([batch, frame, row, column, channel]).reshape(BH * BW, K)
    else:
        row_P = row + tl.arange(0, BH * BW) // BW
        column_P = column + tl.arange(0, BH * BW) % BW
        channel_1K = channel + tl.arange(0, K)[None, :]
        inside_P = (row_P >= 0) & (row_P < height) & (column_P >= 0) & (column_P < width)
        # Inside a frame 32 bits are enough.
        x += batch.to(tl.int64) * stride_b + frame.to(tl.int64) * stride_t
        at_PK = x + (row_P * stride_h + column_P * stride_w)[:, None] + channel_1K
        x_PK = tl.load(at_PK, inside_P[:, None] & (channel_1K < C), 0.0)
    return x_PK.T


@triton.jit
def _load_weights(weight, output, outputs, tap, channel, stride_o, TMA: tl.constexpr,
                  C: tl.constexpr, N: tl.constexpr, K: tl.constexpr):  # fmt: skip
    """Weights of a tap [N, K]. Those of channels past C, which are zero in a box, are some
    others."""
    if TMA:
        return weight.load([output, tap * C + channel])
    else:
        output_N1 = output + tl.arange(0, N)[:, None]
        channel_1K = channel + tl.arange(0, K)[None, :]
        at_NK = weight + output_N1.to(tl.int64) * stride_o + (tap * C + channel_1K)
        return tl.load(at_NK, (output_N1 < outputs) & (channel_1K < C), 0.0)


@triton.jit
def _store_tile(out, acc_NP, bias_ptr, batch, frame, row, column, output, stride_b, stride_t,
                stride_h, stride_w, height, width, outputs, TMA: tl.constexpr,
                HAS_BIAS: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr):  # fmt: skip
    N: tl.constexpr = acc_NP.shape[0]
    output_N = output + tl.arange(0, N)
    if HAS_BIAS:
        bias_N = tl.load(bias_ptr + output_N, output_N < outputs, 0.0).to(tl.float32)
        acc_NP += bias_N[:, None]
    if TMA:
        tile = acc_NP.to(out.dtype).T.reshape(1, 1, BH, BW, N)
        out.store([batch, frame, row, column, output], tile)
    else:
        row_P = row + tl.arange(0, BH * BW) // BW
        column_P = column + tl.arange(0, BH * BW) % BW
        inside_P = (row_P < height) & (column_P < width)
        out += batch.to(tl.int64) * stride_b + frame.to(tl.int64) * stride_t
        at_PN = out + (row_P * stride_h + column_P * stride_w)[:, None] + output_N[None, :]
        mask_PN = inside_P[:, None] & (output_N < outputs)[None, :]
        tl.store(at_PN, acc_NP.T.to(out.dtype.element_ty), mask_PN)


@triton.jit
def _causal_conv3d_kernel(
    x,
    weight,
    weight_rest,
    bias_ptr,
    out,
    out_rest,
    height,
    width,
    outputs,
    columns,
    top,
    left,
    stride_xb,
    stride_xt,
    stride_xh,
    stride_xw,
    stride_ob,
    stride_ot,
    stride_oh,
    stride_ow,
    stride_w,
    TMA: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    C: tl.constexpr,
    S: tl.constexpr,
    Y: tl.constexpr,
    X: tl.constexpr,
    N: tl.constexpr,
    REST: tl.constexpr,
    FRAMES: tl.constexpr,
    BH: tl.constexpr,
    BW: tl.constexpr,
    K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """N + REST channels of a box of FRAMES frames, padded by so many rows at the top and columns at
    the left. With TMA, x, the weights and the output are descriptors, else pointers.

    A turn takes K channels of one tap or, where frames share boxes, of the taps in time together.
    With one tap a turn, products run on from turn to turn."""
    TAPS: tl.constexpr = S if FRAMES > 1 else 1
    tiles = tl.cdiv(outputs, N + REST)
    output, box = tl.program_id(0) % tiles * (N + REST), tl.program_id(0) // tiles
    row, column = box // columns * BH, box % columns * BW
    frame, batch = tl.program_id(1) * FRAMES, tl.program_id(2)
    acc, rest = (), ()  # type: Any, Any
    for _ in tl.static_range(FRAMES):
        acc += (tl.zeros([N, BH * BW], tl.float32),)
        if REST:
            rest += (tl.zeros([REST, BH * BW], tl.float32),)
    steps: tl.constexpr = (C + K - 1) // K
    for turn in tl.range(0, S // TAPS * Y * X * steps, num_stages=STAGES):
        channel, tap = turn % steps * K, turn // steps
        first = tap // (Y * X)
        tap_row, tap_column = tap // X % Y, tap % X
        w, w_rest = (), ()  # type: Any, Any
        for s in tl.static_range(TAPS):
            at = tap + s * (Y * X)
            w += (_load_weights(weight, output, outputs, at, channel, stride_w, TMA, C, N, K),)
            if REST:
                w_rest += (_load_weights(weight_rest, output + N, outputs, at, channel, stride_w,
                                         TMA, C, REST, K),)  # fmt: skip
        for seen in tl.static_range(FRAMES + TAPS - 1):
            x_KP = _load_box(x, batch, frame + first + seen, row + tap_row - top,
                             column + tap_column - left, channel, stride_xb, stride_xt, stride_xh,
                             stride_xw, height, width, TMA, C, K, BH, BW)  # fmt: skip
            new, new_rest = (), ()  # type: Any, Any
            for f in tl.static_range(FRAMES):
                if f <= seen and seen - f < TAPS:
                    new += (dot(w[seen - f], x_KP, acc[f]),)
                    if REST:
                        new_rest += (dot(w_rest[seen - f], x_KP, rest[f]),)
                else:
                    new += (acc[f],)
                    if REST:
                        new_rest += (rest[f],)
            acc, rest = new, new_rest
    for f in tl.static_range(FRAMES):
        _store_tile(out, acc[f], bias_ptr, batch, frame + f, row, column, output, stride_ob,
                    stride_ot, stride_oh, stride_ow, height, width, outputs, TMA, HAS_BIAS, BH,
                    BW)  # fmt: skip
        if REST:
            _store_tile(out_rest, rest[f], bias_ptr, batch, frame + f, row, column, output + N,
                        stride_ob, stride_ot, stride_oh, stride_ow, height, width, outputs, TMA,
                        HAS_BIAS, BH, BW)  # fmt: skip


def causal_conv3d(x_BTHWC: Tensor, weight: Tensor, bias_O: Tensor | None) -> Tensor:
    """Convolution of x and weight [O, C, S, Y, X], which lies in memory as [O, S, Y, X, C]:
    [B, T − S + 1, H, W, O]."""
    B, T, H, W, _ = x_BTHWC.shape
    outputs, _, S, Y, X = weight.shape
    out_BTHWO = x_BTHWC.new_empty(B, T - S + 1, H, W, outputs)
    _convolve(x_BTHWC, weight, bias_O, out_BTHWO, Y // 2, X // 2)
    return out_BTHWO


def upsampled_conv2d(x_BTHWC: Tensor, weight_PQOCYX: Tensor, bias_O: Tensor | None) -> Tensor:
    """The four convolutions of `sfkernels.upsampled_conv2d`, which write each other's neighbours:
    [B, T, 2H, 2W, O]. Each of the weights lies in memory as [O, Y, X, C]."""
    B, T, H, W, _ = x_BTHWC.shape
    out_BTHWO = x_BTHWC.new_empty(B, T, 2 * H, 2 * W, weight_PQOCYX.shape[2])
    for p in range(2):
        for q in range(2):
            weight = weight_PQOCYX[p, q].unsqueeze(2)
            _convolve(x_BTHWC, weight, bias_O, out_BTHWO[:, :, p::2, q::2], 1 - p, 1 - q)
    return out_BTHWO


def _convolve(
    x_BTHWC: Tensor, weight: Tensor, bias_O: Tensor | None, out_BTHWO: Tensor, top: int, left: int
) -> None:
    """Writes the convolution of x, padded by so many rows at the top and columns at the left."""
    C, (B, T, H, W, outputs) = x_BTHWC.shape[-1], out_BTHWO.shape
    S, Y, X = weight.shape[2:]
    if not out_BTHWO.numel():
        return
    setting = launch.box(x_BTHWC, outputs)
    shared = max(n for n in range(1, setting.frames + 1) if T % n == 0)
    tiles = triton.cdiv(outputs, setting.outputs + setting.rest)

    def time(pixels: int) -> int:
        """Whole waves of programs times the work of one, to which its weights add some pixels."""
        programs = tiles * boxes(H, W, pixels)[2] * (T // shared) * B
        waves = triton.cdiv(programs, launch.multiprocessors(x_BTHWC.device))
        return waves * (pixels + WEIGHTS)

    BH, BW, count = boxes(H, W, min(setting.pixels, setting.pixels // 2, key=time))
    K = min(setting.inputs, triton.next_power_of_2(C))
    stride_w = weight.stride(0)
    tma = launch.architecture(x_BTHWC.device) >= HAS_TMA
    args: list[Any] = [x_BTHWC, weight, weight, bias_O, out_BTHWO, out_BTHWO]
    if tma:
        matrix, box = ([outputs, S * Y * X * C], [stride_w, 1]), [1, 1, BH, BW]
        args[0] = TensorDescriptor.from_tensor(x_BTHWC, [*box, K])
        for i, n in enumerate(filter(None, (setting.outputs, setting.rest))):
            args[1 + i] = TensorDescriptor(weight, *matrix, [n, K])
            args[4 + i] = TensorDescriptor.from_tensor(out_BTHWO, [*box, n])
    strides = *x_BTHWC.stride()[:4], *out_BTHWO.stride()[:4], stride_w
    launch.run(
        _causal_conv3d_kernel,
        (tiles * count, T // shared, B),
        (*args, H, W, outputs, triton.cdiv(W, BW), top, left, *strides),
        num_warps=setting.warps,
        TMA=tma,
        HAS_BIAS=bias_O is not None,
        C=C,
        S=S,
        Y=Y,
        X=X,
        N=setting.outputs,
        REST=setting.rest,
        FRAMES=shared,
        BH=BH,
        BW=BW,
        K=K,
        STAGES=setting.stages,
    )


def boxes(height: int, width: int, pixels: int) -> tuple[int, int, int]:
    """Height and width of boxes of `pixels` pixels, of which the fewest cover a frame, and how many
    those are. Of equally good ones the squarest, whose taps reach least far beyond it."""
    sides = [2**i for i in range(pixels.bit_length())]
    sizes = [(h, w) for h in sides if (w := pixels // h) >= FEWEST_COLUMNS]
    counted = [(h, w, triton.cdiv(height, h) * triton.cdiv(width, w)) for h, w in sizes]
    return min(counted, key=lambda size: (size[2], size[0] + size[1]))
