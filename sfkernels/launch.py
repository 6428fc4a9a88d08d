"""Launch settings by GPU architecture, each with its reason or measurement, and the one place
through which every kernel is launched.

A setting that was searched for on a GPU lives in tuned/sm_XX.json (written by `python -m bench
tune`) and comes before the defaults here; beside it, which implementation of an op was fastest.
Nothing is tuned at import or in a hot path.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Multiprocessors of a GPU of each architecture: A100, L40S, H100 and H200, B200.
MULTIPROCESSORS = {80: 108, 89: 142, 90: 132, 100: 148}
ARCHITECTURES = tuple(MULTIPROCESSORS)
TUNED = Path(__file__).parent / "tuned"
LARGEST_ROW = 16384  # channels: 512 threads with 32 elements each
SMALLEST_TILE, LARGEST_TILE = 512, 16384  # elements, of candidates


@dataclass(frozen=True)
class RowTile:
    """A kernel that holds whole rows (all channels of a token) in registers.

    rows: tokens a program holds at once. per_thread: elements of such a tile per thread, which with
    the channels gives the number of warps. per_sm: programs per multiprocessor, each of which loops
    over tiles (0: one program a tile). stages: tiles on their way through shared memory while one
    is computed, that one included (1: none is loaded ahead). why: reason or measurement.
    """

    rows: int
    per_thread: int
    per_sm: int = 0
    stages: int = 1
    why: str = ""

    def warps(self, block: int) -> int:
        """Warps of a program whose rows are padded to `block` elements."""
        return min(max(self.rows * block // (32 * self.per_thread), 1), 16)


@dataclass(frozen=True)
class Flat:
    """An elementwise kernel. block: elements of a program. warps: of a program."""

    block: int
    warps: int
    why: str = ""


@dataclass(frozen=True)
class Tile:
    """An attention kernel: a program holds a stationary tile of tokens (queries; in the backward
    pass of keys and values, keys) and streams the tiles of the other side past it one by one.

    stationary, streamed: tokens of such tiles. warps: of a program (of each consumer, where warps
    are specialised). stages: streamed tiles in shared memory at once. why: reason or measurement.
    """

    stationary: int
    streamed: int
    warps: int
    stages: int
    why: str = ""


@dataclass(frozen=True)
class Product:
    """A product of matrices: a program loops over tiles of 128 rows × some outputs.

    widths: outputs of a tile (256, 192, 128 or 64), of which one launch has one or two. warps,
    stages: as of Tile. per_sm: programs per multiprocessor. why: reason or measurement.
    """

    widths: tuple[int, ...]
    warps: int
    stages: int
    per_sm: int = 1
    why: str = ""


@dataclass(frozen=True)
class Box:
    """A convolution kernel: a program computes some channels of the pixels of a box, with a product
    over as many channels in of one tap after the other.

    outputs, rest: channels, powers of two of which the second may be 0, in two products a tap.
    pixels: of a box in one frame, or half of them where that fills the card better. frames: those
    that share what they see. inputs: channels in of a step. warps: of a program. stages: steps on
    their way through shared memory while one is computed, that one included. why: reason or
    measurement.
    """

    outputs: int
    rest: int
    pixels: int
    frames: int
    inputs: int
    warps: int
    stages: int
    why: str = ""


Setting = RowTile | Flat | Tile | Product | Box

_FEW_BYTES = "too few bytes to matter: latency of one launch"
_AS_H200 = "won at this size on an H200, or came within 3% with less shared memory; measured there"
_WIDE = "5120 channels: the fewest warps whose sums do not spill; measured on an H200"
_UNMEASURED = "by analogy with the forms measured; not measured on a GPU yet"
_SHORT = "32 elements a thread, as of longer rows; not measured on a GPU yet"
_FEW_ROWS = "each row of a tile loads its statistics; not measured on a GPU yet"
_LARGEST = "the largest tiles that do not spill; not measured on a GPU yet"
_SHARED = "frames share boxes, which come from L2 too slowly else; not measured on a GPU yet"
_EXACT = Tile(32, 32, 8, 1, why="float32, which only tests use")
# By kernel and by the number of channels a setting is for (the nearest is taken).
_DEFAULTS: dict[str, dict[int, Setting]] = {
    "norm_fwd": {1536: RowTile(1, 32, why=_AS_H200)},
    "norm_bwd": {
        1536: RowTile(2, 32, 2, 4, why=_AS_H200),
        5120: RowTile(1, 32, 2, 1, why=_UNMEASURED),
    },
    "adaln_fwd": {1536: RowTile(1, 32, 8, 3, why=_AS_H200), 5120: RowTile(1, 32, why=_UNMEASURED)},
    "adaln_bwd": {
        1536: RowTile(1, 16, 4, 2, why=_UNMEASURED),
        5120: RowTile(1, 32, 2, 1, why=_UNMEASURED),
    },
    "residual_norm_fwd": {
        1536: RowTile(1, 16, 4, 3, why=_AS_H200),
        5120: RowTile(1, 32, 8, why=_WIDE),
    },
    "residual_norm_bwd": {
        1536: RowTile(1, 16, 2, 3, why=_AS_H200),
        5120: RowTile(1, 16, 4, why=_WIDE),
    },
    "norm_silu_fwd": {
        96: RowTile(32, 32, why=_SHORT),
        192: RowTile(16, 32, why=_SHORT),
        384: RowTile(8, 32, why=_SHORT),
    },
    "norm_silu_bwd": {
        96: RowTile(4, 16, 16, why=_FEW_ROWS),
        192: RowTile(4, 16, 8, why=_FEW_ROWS),
        384: RowTile(4, 16, 4, why=_FEW_ROWS),
    },
    "qk_norm_rope_fwd": {1536: RowTile(1, 32, why=_AS_H200)},
    "qk_norm_rope_bwd": {
        1536: RowTile(1, 32, 8, why=_AS_H200),
        5120: RowTile(1, 32, 4, why=_UNMEASURED),
    },
    "quantize_rows": {1536: RowTile(1, 32, why=_UNMEASURED)},
    "rope_table": {64: RowTile(16, 8, why=_FEW_BYTES)},
    "sampler": {1: Flat(512, 4, why=_FEW_BYTES)},
    # Attention, by the bytes of a head's row.
    "attention_fwd": {256: Tile(128, 64, 8, 2, why=_LARGEST), 512: _EXACT},
    "attention_dkdv": {
        128: Tile(128, 64, 8, 2, why=_LARGEST),
        256: Tile(64, 64, 8, 2, why=_LARGEST),
        512: _EXACT,
    },
    "attention_dq": {
        128: Tile(128, 64, 8, 2, why=_LARGEST),
        256: Tile(128, 32, 8, 2, why=_LARGEST),
        512: _EXACT,
    },
    "hopper_fwd": {
        256: Tile(128, 128, 4, 2, why=_UNMEASURED),
        128: Tile(128, 128, 4, 4, why=_UNMEASURED),
    },
    "hopper_bwd": {256: Tile(128, 64, 4, 2, why=_UNMEASURED)},
    "hopper_dkdv": {
        256: Tile(128, 64, 4, 4, why=_UNMEASURED),
        128: Tile(128, 128, 4, 4, why=_UNMEASURED),
    },
    "hopper_dq": {256: Tile(128, 64, 4, 4, why=_UNMEASURED)},
    # By outputs.
    "linear": {1536: Product((128,), 8, 4, why=_LARGEST)},
    # By channels out.
    "causal_conv3d": {
        96: Box(128, 0, 128, 1, 32, 8, 3, why=_LARGEST),
        192: Box(128, 64, 128, 1, 32, 8, 3, why=_LARGEST),
    },
    "causal_conv3d_float32": {1: Box(32, 0, 32, 1, 32, 4, 1, why="float32, which only tests use")},
}
# Where tuned/ has no file, nothing was measured on that architecture: the same reasoning holds on
# all four, whose register files are equal. What does not fit one of them is found by
# `python -m sfkernels.check`.
DEFAULTS: dict[int, dict[str, dict[int, Setting]]] = {
    arch: dict(_DEFAULTS) for arch in ARCHITECTURES
}
DEFAULTS[100]["attention_fwd"] = _DEFAULTS["attention_fwd"] | {
    256: Tile(128, 64, 8, 3, why=_LARGEST)
}
DEFAULTS[100]["attention_dq"] = _DEFAULTS["attention_dq"] | {128: Tile(128, 32, 8, 2, why=_LARGEST)}
DEFAULTS[90]["attention_dkdv"] = _DEFAULTS["attention_dkdv"] | {
    256: Tile(128, 32, 8, 3, why="P stays in registers with 16 keys a warp; " + _LARGEST)
}
DEFAULTS[90]["attention_dq"] = _DEFAULTS["attention_dq"] | {
    128: Tile(128, 128, 8, 2, why=_LARGEST),
    256: Tile(128, 64, 8, 2, why=_LARGEST),
}
for _arch in (90, 100):
    DEFAULTS[_arch]["linear"] = {
        1536: Product((256, 192), 8, 4, why="two widths share the last wave; " + _LARGEST)
    }
    DEFAULTS[_arch]["causal_conv3d"] = {
        96: Box(128, 0, 256, 1, 32, 8, 4, why=_LARGEST),
        192: Box(128, 64, 256, 1, 64, 8, 4, why=_LARGEST),
    }
DEFAULTS[90]["causal_conv3d"] |= {96: Box(128, 0, 128, 3, 32, 8, 3, why=_SHARED)}

# Settings that come before all others, by kernel: the tuner's candidates, a test's odd sizes.
overrides: dict[str, Setting] = {}


@contextlib.contextmanager
def using(**settings: Setting) -> Iterator[None]:
    """Replaces settings in the body, by the kernel's name."""
    before = dict(overrides)
    overrides.update(settings)
    try:
        yield
    finally:
        overrides.clear()
        overrides.update(before)


# Takes every launch instead of a GPU: the ahead-of-time check for the architecture `target`.
recorder: Callable[..., None] | None = None
target: int | None = None


def run(
    kernel: Any, grid: Sequence[int], args: Sequence[Any], *, num_warps: int, **meta: Any
) -> None:
    """Launches a Triton kernel on the device of its tensors, which descriptors may stand for."""
    if recorder is not None:
        recorder(kernel, grid, args, num_warps=num_warps, **meta)
        return
    tensors = (t for a in args if isinstance(t := getattr(a, "base", a), Tensor))
    with torch.cuda.device_of(next(tensors)):
        kernel[tuple(grid)](*args, num_warps=num_warps, **meta)


def rows(kernel: str, device: torch.device, channels: int) -> RowTile:
    """The setting of a row kernel for tokens of so many channels. Raises ValueError where a row is
    too long for the registers of one program."""
    if channels > LARGEST_ROW:
        raise ValueError(
            f"tokens have {channels} channels: the Triton kernels hold a token in registers and "
            f"take at most {LARGEST_ROW}; use impl='reference'"
        )
    setting = overrides.get(kernel) or _setting(kernel, architecture(device), channels)
    assert isinstance(setting, RowTile)
    return setting


def flat(kernel: str, device: torch.device) -> Flat:
    """The setting of an elementwise kernel."""
    setting = overrides.get(kernel) or _setting(kernel, architecture(device), 1)
    assert isinstance(setting, Flat)
    return setting


def tile(kernel: str, device: torch.device, head_bytes: int) -> Tile:
    """The setting of an attention kernel for heads whose rows have so many bytes."""
    setting = overrides.get(kernel) or _setting(kernel, architecture(device), head_bytes)
    assert isinstance(setting, Tile)
    return setting


def product(kernel: str, device: torch.device, outputs: int) -> Product:
    """The setting of a product of matrices with so many outputs."""
    setting = overrides.get(kernel) or _setting(kernel, architecture(device), outputs)
    assert isinstance(setting, Product)
    return setting


def box(x: Tensor, outputs: int) -> Box:
    """The setting of the convolution kernel for so many channels out."""
    kernel = "causal_conv3d_float32" if x.dtype == torch.float32 else "causal_conv3d"
    setting = overrides.get(kernel) or _setting(kernel, architecture(x.device), outputs)
    assert isinstance(setting, Box)
    return setting


def strips(setting: RowTile, device: torch.device, tiles: int, parts: int) -> int:
    """Number of programs that share the `tiles` of each of `parts` frames."""
    if not setting.per_sm:
        return tiles
    return min(tiles, math.ceil(setting.per_sm * multiprocessors(device) / parts))


def multiprocessors(device: torch.device) -> int:
    if device.type == "cuda":
        return _multiprocessors(device)
    if device.type == "meta":  # ahead of time
        return MULTIPROCESSORS[target or 90]
    return 2  # under the interpreter: more than one, so that partial sums are summed


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def architecture(device: torch.device) -> int:
    """The newest architecture with settings that the device is not older than."""
    return _capability(device) if device.type == "cuda" else target or 90


def is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


@functools.cache
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return max((a for a in ARCHITECTURES if a <= 10 * major + minor), default=ARCHITECTURES[0])


@functools.cache
def _setting(kernel: str, arch: int, channels: int) -> Setting:
    settings = dict(DEFAULTS[arch][kernel])
    kind = type(next(iter(settings.values())))
    names = {f.name for f in dataclasses.fields(kind)}
    for entry in tuned(arch).get(kernel, []):
        settings[entry["channels"]] = kind(**{k: v for k, v in entry.items() if k in names})
    return _nearest(settings, channels)


def _nearest(settings: dict[int, Setting], channels: int) -> Setting:
    return settings[min(settings, key=lambda n: abs(math.log2(n / channels)))]


def untuned(kernel: str, device: torch.device, channels: int) -> Setting:
    """The default for the nearest number of channels, whatever was measured before."""
    return _nearest(DEFAULTS[architecture(device)][kernel], channels)


@functools.cache
def tuned(arch: int) -> dict[str, list[dict[str, Any]]]:
    """Measured settings of an architecture: for each kernel, one per number of channels (1 for
    elementwise kernels). Empty where nothing was measured."""
    kernels: dict[str, list[dict[str, Any]]] = _measured(arch)["kernels"]
    return kernels


@functools.cache
def ranking(arch: int) -> dict[str, list[str]]:
    """Implementations of ops that were timed on an architecture, the fastest first, by op."""
    ranked: dict[str, list[str]] = _measured(arch).get("impl", {})
    return ranked


def _measured(arch: int) -> dict[str, Any]:
    file = TUNED / f"sm_{arch}.json"
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"kernels": {}}
    return found


def candidates(
    default: Setting, channels: int, sums: bool = False, specialised: bool = False
) -> list[Setting]:
    """The default, then all others that make a program of their own. sums: the kernel keeps sums
    over its tiles, so that every program must loop. specialised: warps are."""
    same = replace(default, why="")
    if isinstance(default, Flat):
        flats = [Flat(b, w) for b in (256, 512, 1024, 2048, 4096) for w in (1, 2, 4, 8)]
        return [default, *(flat for flat in flats if flat != same)]
    if isinstance(default, Product):
        whole = itertools.product(((256, 192), (256,), (256, 128)), (8,), (3, 4), (1,))
        halves = itertools.product(((128,), (128, 64)), (4, 8), (2, 3), (2,))
        products = itertools.starmap(Product, (*whole, *halves))
        return [default, *(product for product in products if product != same)]
    if isinstance(default, Box):
        sizes = (64, 128), (0, 64), (128, 256), (1, 3), (32, 64), (4, 8), (2, 3, 4)
        boxes = itertools.starmap(Box, itertools.product(*sizes))
        return [default, *(box for box in boxes if box != same)]
    if isinstance(default, Tile):
        # Where warps are specialised, a consumer has four and there are two of 64 tokens.
        fixed = (128,), (32, 64, 128), (4,), (2, 3, 4)
        free = (64, 128), (32, 64, 128), (4, 8), (1, 2, 3, 4)
        tiles = itertools.starmap(Tile, itertools.product(*(fixed if specialised else free)))
        return [default, *(tile for tile in tiles if tile != same)]
    block = 2 ** math.ceil(math.log2(channels))
    few = [rows for rows in (1, 2, 4) if rows * block >= SMALLEST_TILE]
    more = [rows for rows in (8, 16, 32, 64) if rows * block <= LARGEST_TILE // 2]
    found: dict[Setting, None] = {same: None}  # in order
    for rows, per_thread, stages, warps_per_sm in itertools.product(
        few + more, (8, 16, 32), (1, 2, 3, 4), (0, 8, 16, 32, 64)
    ):
        setting = RowTile(rows, per_thread, 1, stages)
        warps = setting.warps(block)
        whole = warps * 32 * per_thread == rows * block  # not clamped
        if not whole or rows * block > LARGEST_TILE or warps_per_sm % warps:
            continue
        if not warps_per_sm and (sums or stages > 1):
            continue  # one tile a program has no next one to load, and no sums to keep
        found[replace(setting, per_sm=warps_per_sm // warps)] = None
    return [default, *[*found][1:]]


def outer_strides(*tensors: Tensor | None) -> list[int]:
    """The first two strides of each tensor, 0 where it is absent or has one entry to broadcast."""
    return [0 if t is None or t.shape[d] == 1 else t.stride(d) for t in tensors for d in (0, 1)]


def of_sample(tensor: Tensor | None, dims: int) -> int:
    """The stride from sample to sample of a tensor of `dims` dimensions, 0 where it has fewer: one
    for all."""
    if tensor is None or tensor.dim() < dims or tensor.shape[0] == 1:
        return 0
    return tensor.stride(0)
