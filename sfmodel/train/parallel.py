"""Training on many ranks, with PyTorch's own engines: `torchrun` starts them, `fully_shard` (FSDP2)
cuts the models into them, torch.distributed.checkpoint writes what they hold.

A checkpoint is a folder `step-N`. It is written under another name and renamed when it is whole, so
that whatever carries that name can be resumed, on any number of ranks.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pathlib
import pickle
import re
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as read
from torch.distributed.checkpoint.state_dict_saver import save as write
from torch.distributed.fsdp import (
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from sfmodel import files
from sfmodel.dit import DiT
from sfmodel.files import cannot_write
from sfmodel.ranks import Ranks, lost

Model = TypeVar("Model", bound=nn.Module)
FACTS = "run.json"  # of a checkpoint: its step and the settings of its run
_NAME = re.compile(r"step-([0-9]{6}|[1-9][0-9]{6,})")
_PART = re.compile(rf"\.(failed-)?{_NAME.pattern}\.part")


@contextlib.contextmanager
def alone(folder: Path, ranks: Ranks) -> Iterator[None]:
    """Holds a folder as `files.alone`, which the first rank asks; where it is refused, all are.
    Removes what was left of checkpoints by a run that was killed while it wrote."""
    refused: Exception | None = None
    with contextlib.ExitStack() as stack:
        if ranks.first:
            try:
                stack.enter_context(files.alone(folder))
                for left in folder.glob("checkpoints/.*.part"):
                    if _PART.fullmatch(left.name):
                        shutil.rmtree(left, ignore_errors=True)
            except (ValueError, OSError) as error:
                refused = error
        if ranks.any(refused is not None):
            raise refused or ValueError(f"{folder}: the first rank may not write there")
        yield


def place(
    model: Model,
    state: Mapping[str, Tensor],
    ranks: Ranks,
    *,
    bf16: bool = False,
) -> Model:
    """A model that was made on the meta device, cut over the ranks and filled with `state`, which
    only the first rank needs to have. bf16: what is gathered for the arithmetic is in bfloat16; the
    ranks keep their own parts, and sum gradients, in the model's dtype."""
    if ranks.mesh is not None:
        whole: dict[str, Any] = {"mesh": ranks.mesh, "reshard_after_forward": True}
        half = torch.bfloat16 if bf16 else None
        # The inputs hold tables in float32 that must stay so; Linear casts its own under autocast.
        policy = MixedPrecisionPolicy(half, torch.float32, cast_forward_inputs=False)
        if isinstance(model, DiT):
            # The modulation and the norms of blocks are used between them: they go with the root.
            for block in model.blocks:
                for part in (block.self_attn, block.cross_attn, block.ffn):
                    fully_shard(part, mp_policy=policy, **whole)  # type: ignore[arg-type]
                register_fsdp_forward_method(block.cross_attn, "keys_values")  # type: ignore[arg-type]
        fully_shard(model, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False), **whole)
        for method in ("text_keys", "features", "append"):
            if hasattr(model, method):
                register_fsdp_forward_method(model, method)
    model.to_empty(device=ranks.device)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=ranks.world > 1)
    set_model_state_dict(model, dict(state), options=options)
    return model


def local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Parts of a tensor that this rank holds."""
    return [t.to_local() if isinstance(t, DTensor) else t for t in tensors]


def learned(model: nn.Module) -> dict[str, Tensor]:
    """Weights of a model that learn, by name, without gradient."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def full_state(state: Mapping[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """Whole tensors of what is cut over the ranks, on the CPU of the first one; empty on the
    others."""
    whole = {}
    for name, value in state.items():  # in memory of a device is one of them at a time
        found = value.full_tensor() if isinstance(value, DTensor) else value
        if ranks.first:
            whole[name] = found.detach().cpu()
    return whole


def save(
    folder: Path,
    step: int,
    state: dict[str, Any],
    facts: dict[str, Any],
    ranks: Ranks,
    prefix: str = "",
    keep: int = 2,
) -> Path:
    """Writes `state` and JSON `facts` as the checkpoint of a step, and removes all but the newest
    `keep`. Atomic; one that is there already is left as it is, for a run is the same every time.
    prefix: for a name that `checkpoints` passes over, and that another run may have left. Raises
    OSError where it cannot be written."""
    path = folder / f"{prefix}step-{step:06d}"
    part = folder / f".{path.name}.part"
    if ranks.any(path.exists()):
        if not prefix:
            return path
        ranks.wait()
        if ranks.first:
            shutil.rmtree(path, ignore_errors=True)
    try:
        part.mkdir(parents=True, exist_ok=True)
        with _alone():
            writer = _Writer(part)
            write(state, checkpoint_id=part, storage_writer=writer, no_dist=ranks.world == 1)
        if ranks.first:
            (part / FACTS).write_text(json.dumps({"step": step, **facts}))
            for name in [*part.iterdir(), part]:
                _sync(name)
            os.replace(part, path)
            _sync(folder)
            for old in checkpoints(folder)[:-keep]:
                going = folder / f".{old.name}.part"  # never half of it under its own name
                os.replace(old, going)
                shutil.rmtree(going, ignore_errors=True)
    except (OSError, RuntimeError, CheckpointException) as error:
        if lost(error):
            raise
        shutil.rmtree(part, ignore_errors=True)
        raise cannot_write(path, _cause(error)) from error
    ranks.wait()
    return path


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoints in a run's folder, the newest last. Nothing else that lies there counts."""
    return sorted((path for path in folder.glob("step-*") if _step(path) >= 0), key=_step)


def _step(path: Path) -> int:
    """The update of a run's own checkpoint, -1 for what is none."""
    named = _NAME.fullmatch(path.name)
    return int(named[1]) if named and path.is_dir() else -1


def facts(path: Path) -> dict[str, Any]:
    """The step and the facts that `save` was given with a checkpoint. Raises ValueError where they
    cannot be read."""
    try:
        for each in path.iterdir():
            if each.is_symlink():
                raise ValueError(f"{each.name} is a link, which leads out of it")
        found = json.loads((path / FACTS).read_text())
        if not isinstance(found, dict) or found.get("step") != _step(path):
            raise ValueError(f"{FACTS} is not of this step")
        return found
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(path, error) from None


def load(path: Path, state: dict[str, Any], ranks: Ranks) -> None:
    """Fills `state` in place. Raises ValueError for a checkpoint that is damaged or of something
    else."""
    if not (path / ".metadata").is_file():
        raise damaged(path, ValueError("it has no .metadata"))
    try:
        with _alone():
            read(
                state, checkpoint_id=path, storage_reader=_Reader(path), planner=_Planner(),
                no_dist=ranks.world == 1,
            )  # fmt: skip
    except (Exception, CheckpointException) as error:
        if lost(error):
            raise
        raise damaged(path, _cause(error)) from None


class _Writer(filesystem.FileSystemWriter):
    """Writes no names of its own into the index: equal runs write equal files."""

    def storage_meta(self) -> None:
        return None


class _Reader(filesystem.FileSystemReader):
    """Runs no code of a checkpoint, and reads no file outside its folder."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        index = _Index(io.BytesIO((path / ".metadata").read_bytes())).load()
        if not isinstance(index, metadata.Metadata) or not isinstance(index.storage_data, dict):
            raise ValueError("its .metadata is no index")
        for info in index.storage_data.values():
            name = info.relative_path
            if not isinstance(name, str) or Path(name).name != name or info.transform_descriptors:
                raise ValueError(f"its .metadata names {name!r}, which is not in its folder")
        self.index = index

    def read_metadata(self, *_: Any, **__: Any) -> metadata.Metadata:
        return self.index


_INDEX: dict[tuple[str, str], Any] = {
    (known.__module__, known.__qualname__): known
    for known in (
        metadata.Metadata, metadata.MetadataIndex, metadata.StorageMeta, torch.Size,
        metadata.TensorStorageMetadata, metadata.BytesStorageMetadata,
        metadata.ChunkStorageMetadata, metadata.TensorProperties, metadata._MEM_FORMAT_ENCODING,
        filesystem._StorageInfo, torch.serialization._get_layout,
    )
}  # fmt: skip
_INDEX |= {(module, "PosixPath"): pathlib.PosixPath for module in ("pathlib", "pathlib._local")}


class _Index(pickle._Unpickler):
    """Reads pickles of what the index of a checkpoint consists of, and of nothing else. That of C
    would make room for as many objects as a pickle claims to have."""

    def find_class(self, module: str, name: str) -> Any:
        dtype = getattr(torch, name, None) if module == "torch" else None
        if isinstance(dtype, torch.dtype):
            return dtype
        if (module, name) not in _INDEX:
            raise pickle.UnpicklingError(f"its .metadata names {module}:{name}")
        return _INDEX[module, name]


class _Planner(DefaultLoadPlanner):
    """Takes values of the types that they have in this run."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        name = read_item.dest_index.fqn
        found, own = torch.load(value, weights_only=True), self.state_dict[name]
        if type(found) is not type(own):
            raise ValueError(f"{name} is of type {type(found).__name__}")
        plain = io.BytesIO()
        torch.save(found, plain)
        plain.seek(0)
        super().load_bytes(read_item, plain)


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Silences the remark that a single rank is one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


def damaged(path: Path, error: Exception) -> ValueError:
    """The error to raise for a checkpoint that cannot be read, which says what there is else."""
    before = [p.name for p in checkpoints(path.parent) if _step(p) < _step(path)]
    instead = f"; without it the run goes on from {before[-1]}" if before else ""
    reason = str(error).partition("\n")[0].partition(". ")[0] or type(error).__name__
    return ValueError(f"{path}: not a whole checkpoint ({reason}){instead}")


def _cause(error: BaseException) -> Exception:
    """The error of one rank inside that of all of them. Raises KeyboardInterrupt where it was
    that."""
    if isinstance(error, CheckpointException):
        reported = [first for first, _ in error.failures.values()]
        if any(isinstance(each, KeyboardInterrupt) for each in reported):
            raise KeyboardInterrupt
        return next((e for e in reported if isinstance(e, Exception)), OSError(str(error)))
    assert isinstance(error, Exception)
    return error


def _sync(path: Path) -> None:
    """Waits until the disk has a file's, or a folder's, contents."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
