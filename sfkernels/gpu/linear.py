"""Linear layers: a matrix product with bias and GELU in its epilogue, for sm_80 and later.

Shapes: B batch, L tokens, C channels, O outputs, M = B·L rows; of a tile R rows or outputs,
N outputs, K channels that one step multiplies.

Floating-point operations: 2·M·C·O; bytes: those of x, the weight and y once each, which take less
time than the product from a few hundred rows on. Wan2.1-1.3B, one chunk (M = 4680, bfloat16), at
the 790 TFLOP/s that an H200 multiplies matrices: 28 us for 1536 → 1536, 84 us for 1536 → 4608, 163
us for 1536 → 8960 and back. GELU as a pass of its own would move another 168 MB, 39 us at 4.3 TB/s.
Not measured on a GPU yet.

Where tiles are all equally wide, multiprocessors are idle in the last wave: of 132, at M = 4680 and
O = 1536, 17% of the time. So the first strips of 128 rows are cut into wide tiles and the last ones
into narrower ones, as `plan` finds best. Outputs in all, as a share of those that could be computed
in the time of the program with the most, for tiles of 256 and 192 outputs:

    M      O = 1536            O = 4608            O = 8960
    1560   74% (192)           83% (256)           92% (256 and 192)
    4680   95% (256 and 192)   95% (256 and 192)   97% (256)
    9360   95% (256 and 192)   97% (256 and 192)   98% (256 and 192)

Splitting the channels would fill more of the card with a frame alone, but writes and reads partial
sums in float32 and launches twice, which at C = 1536 takes as long as it saves.
"""

from __future__ import annotations

import functools
from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from sfkernels import launch

ROWS = 128  # of a tile
DEPTH = (
    64  # channels of a step: 128 bytes, the widest row of a tile that TMA lays out for a product
)
TMA = 90  # the first architecture that has it
# Outputs that a program could have computed while it fills its pipeline and stores a tile.
STARTING = 16
# Widths of tiles as powers of two, each of which is a product of its own.
PARTS = {256: (256, 0), 192: (128, 64), 128: (128, 0), 64: (64, 0), 0: (0, 0)}


@triton.jit
def _load(source, row, k, past, channels, stride, R: tl.constexpr, BLOCK_K: tl.constexpr,
          BY_TMA: tl.constexpr):  # fmt: skip
    """A tile [R, K] of x or of the weight, zeros beyond their ends."""
    if BY_TMA:
        return source.load([row, k])
    else:
        row_R1 = row + tl.arange(0, R)[:, None]
        k_1K = k + tl.arange(0, BLOCK_K)[None, :]
        at_RK = source + (row_R1.to(tl.int64) * stride + k_1K)
        return tl.load(at_RK, (row_R1 < past) & (k_1K < channels), 0.0)


@triton.jit
def _finish(acc_RN, bias_ptr, y_ptr, row, col, rows, outputs, GELU: tl.constexpr):
    row_R1 = row + tl.arange(0, acc_RN.shape[0])[:, None]
    col_1N = col + tl.arange(0, acc_RN.shape[1])[None, :]
    if bias_ptr is not None:
        acc_RN += tl.load(bias_ptr + col_1N, col_1N < outputs, 0.0).to(tl.float32)
    if GELU:
        # x/2 · (1 + tanh(√(2/π)·(x + 0.044715·x³))), the tanh by one exponential of base 2.
        inner_RN = acc_RN * (-2.302208198 - 0.1029432397 * acc_RN * acc_RN)
        acc_RN = acc_RN / (1.0 + tl.exp2(inner_RN))
    at_RN = y_ptr + (row_R1.to(tl.int64) * outputs + col_1N)
    tl.store(at_RN, acc_RN.to(y_ptr.dtype.element_ty), (row_R1 < rows) & (col_1N < outputs))


@triton.jit
def _tiles(x, weight, rest, bias_ptr, y_ptr, first, past, start, rows, outputs, channels, stride_x,
           stride_w, WIDE: tl.constexpr, REST: tl.constexpr, BLOCK_M: tl.constexpr,
           BLOCK_K: tl.constexpr, GELU: tl.constexpr, BY_TMA: tl.constexpr,
           STAGES: tl.constexpr):  # fmt: skip
    """Every tile of WIDE + REST outputs that falls to this program, from row `start` on: numbers
    first, first + programs, … below `past`, along the strips."""
    WIDTH: tl.constexpr = WIDE + REST
    along = tl.cdiv(outputs, WIDTH)
    for tile in range(first, past, tl.num_programs(0)):
        row, col = start + tile // along * BLOCK_M, tile % along * WIDTH
        acc_RN = tl.zeros([BLOCK_M, WIDE], tl.float32)
        if REST:
            rest_RN = tl.zeros([BLOCK_M, REST], tl.float32)
        for k in tl.range(0, channels, BLOCK_K, num_stages=STAGES):
            x_RK = _load(x, row, k, rows, channels, stride_x, BLOCK_M, BLOCK_K, BY_TMA)
            w_NK = _load(weight, col, k, outputs, channels, stride_w, WIDE, BLOCK_K, BY_TMA)
            acc_RN = tl.dot(x_RK, w_NK.T, acc_RN)
            if REST:
                w_NK = _load(rest, col + WIDE, k, outputs, channels, stride_w, REST, BLOCK_K,
                             BY_TMA)  # fmt: skip
                rest_RN = tl.dot(x_RK, w_NK.T, rest_RN)
        _finish(acc_RN, bias_ptr, y_ptr, row, col, rows, outputs, GELU)
        if REST:
            _finish(rest_RN, bias_ptr, y_ptr, row, col + WIDE, rows, outputs, GELU)


@triton.jit
def _linear_kernel(
    x,
    w_head,
    w_head_rest,
    w_tail,
    w_tail_rest,
    bias_ptr,
    y_ptr,
    head_tiles,
    tail_tiles,
    head_rows,
    rows,
    outputs,
    channels,
    stride_x,
    stride_w,
    HEAD: tl.constexpr,
    HEAD_REST: tl.constexpr,
    TAIL: tl.constexpr,
    TAIL_REST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GELU: tl.constexpr,
    BY_TMA: tl.constexpr,
    STAGES: tl.constexpr,
):
    """x [M, C] and the weight [O, C] are tensors or, BY_TMA, descriptors: w_head of boxes of HEAD
    rows, and so on. Rows from `head_rows` on are cut into tiles of TAIL + TAIL_REST outputs; they
    fall to the programs that have the fewest of the others first."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    _tiles(x, w_head, w_head_rest, bias_ptr, y_ptr, program, head_tiles, 0, rows, outputs, channels,
           stride_x, stride_w, HEAD, HEAD_REST, BLOCK_M, BLOCK_K, GELU, BY_TMA,
           STAGES)  # fmt: skip
    if TAIL:
        first = (program + programs - head_tiles % programs) % programs
        _tiles(x, w_tail, w_tail_rest, bias_ptr, y_ptr, first, tail_tiles, head_rows, rows, outputs,
               channels, stride_x, stride_w, TAIL, TAIL_REST, BLOCK_M, BLOCK_K, GELU, BY_TMA,
               STAGES)  # fmt: skip


@functools.cache
def plan(rows: int, outputs: int, programs: int, widths: tuple[int, ...]) -> tuple[int, int, int]:
    """The number of strips of 128 rows that are cut into tiles of one width, that width, and the
    width of the others' tiles, 0 where there are none: the plan with the shortest time, which is
    that of the program with the most outputs to compute."""
    strips = triton.cdiv(rows, ROWS)

    def time(head_strips: int, head: int, tail: int) -> int:
        heads = head_strips * triton.cdiv(outputs, head)
        tails = (strips - head_strips) * triton.cdiv(outputs, tail) if tail else 0
        # The first program has the most of the head; where that ends, one has the most of the tail.
        return max(
            triton.cdiv(heads - first, programs) * (head + STARTING)
            + triton.cdiv(tails - (first - heads) % programs, programs) * (tail + STARTING)
            for first in (0, heads % programs)
        )

    whole = [(strips, head, 0) for head in widths]
    pairs = [
        (head_strips, head, tail)
        for head in widths
        for tail in widths
        for head_strips in range(1, strips)
        if tail < head
    ]
    return min(whole + pairs, key=lambda way: time(*way))


def linear(x_BLC: Tensor, weight_OC: Tensor, bias_O: Tensor | None, gelu: bool) -> Tensor:
    """x Wᵀ + bias, of that GELU if asked: [B, L, O], contiguous."""
    x_MC = x_BLC.flatten(0, 1)
    rows, (outputs, channels) = len(x_MC), weight_OC.shape
    y_BLO = x_BLC.new_empty(*x_BLC.shape[:2], outputs)
    if not y_BLO.numel():
        return y_BLO
    setting = launch.product("linear", x_BLC.device, outputs)
    programs = setting.per_sm * launch.multiprocessors(x_BLC.device)
    head_strips, head, tail = plan(rows, outputs, programs, tuple(setting.widths))
    heads = head_strips * triton.cdiv(outputs, head)
    tails = (triton.cdiv(rows, ROWS) - head_strips) * triton.cdiv(outputs, tail) if tail else 0
    by_tma = launch.architecture(x_BLC.device) >= TMA and all(map(_fits_tma, (x_MC, weight_OC)))

    def source(of: Tensor, box: int) -> Any:
        if not box:
            return None
        return TensorDescriptor.from_tensor(of, [box, DEPTH]) if by_tma else of

    parts = *PARTS[head], *PARTS[tail]
    launch.run(
        _linear_kernel,
        (min(programs, heads + tails),),
        (
            *(source(x_MC, ROWS), *(source(weight_OC, part) for part in parts), bias_O, y_BLO),
            *(heads, tails, head_strips * ROWS, rows, outputs, channels),
            *(x_MC.stride(0), weight_OC.stride(0)),
        ),
        num_warps=setting.warps,
        **dict(zip(("HEAD", "HEAD_REST", "TAIL", "TAIL_REST"), parts, strict=True)),
        BLOCK_M=ROWS,
        BLOCK_K=DEPTH,
        GELU=gelu,
        BY_TMA=by_tma,
        STAGES=setting.stages,
    )
    return y_BLO


def _fits_tma(x_RC: Tensor) -> bool:
    """Tells whether TMA can read it: its rows lie one behind the other and begin at multiples of 16
    bytes."""
    stride = x_RC.stride(0)
    starts = x_RC.data_ptr() % 16 == 0 and stride * x_RC.itemsize % 16 == 0
    return starts and stride >= x_RC.shape[1]
