"""Files of tensors (safetensors), written one tensor after the other and the same every time.

The library's own writer needs all tensors in memory, orders the metadata at random, and leaves its
unfinished file behind when it is killed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from sfmodel.files import atomic

CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def save_tensors(
    path: str | Path, state: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Writes tensors of any device and strides. Atomic: the file is whole or absent. Raises OSError
    where it cannot be written."""
    with atomic(path) as part, part.open("wb") as file:
        write_tensors(file, state, metadata)


def write_tensors(
    file: BinaryIO,
    state: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    dtype: torch.dtype | None = None,
) -> None:
    """Writes tensors into an open file, in `dtype` if given: in memory is one of them at a time."""
    header: dict[str, Any] = {"__metadata__": {**metadata}} if metadata else {}
    # The widest types first, so that every tensor lies at a multiple of its type's size.
    order = sorted(state.items(), key=lambda item: (-(dtype or item[1].dtype).itemsize, item[0]))
    end = 0
    for name, value in order:
        begin, end = end, end + size_of(value, dtype)
        code = CODES[dtype or value.dtype]
        header[name] = {"dtype": code, "shape": [*value.shape], "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for _, value in order:
        file.write(_dense(value, dtype).flatten().view(torch.uint8).numpy().data)


def _dense(value: Tensor, dtype: torch.dtype | None) -> Tensor:
    # By no name where it is called, which would keep it in memory beside the next one.
    return value.detach().to("cpu", dtype or value.dtype).contiguous()


def size_of(value: Tensor, dtype: torch.dtype | None = None) -> int:
    """Bytes of a tensor in `dtype`, its own if not given."""
    return value.numel() * (dtype or value.dtype).itemsize
