"""Other people's code as a peer: the model of a clone of Self Forcing, CausVid or LongLive, under
our random weights, in the place of ours in a stream.

The model's file is imported as it stands and its forward called as its pipeline calls it, with
caches as that makes them. All around it is this project's: noise, sampler, VAE, copy to the host.
Sizes that the public code has fixed at 480×832 (frames of 1560 tokens) are set to the stream's.
flash-attn is used where the clone finds it and computes in bfloat16, else PyTorch's SDPA. Not
measured on a GPU yet.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import timing
from sfkernels import RingKVCache
from sfkernels.integrations import patch
from sfkernels.integrations.causal_wan import CAUSVID, LONGLIVE, SELF_FORCING, VERSIONS
from sfkernels.integrations.forwards import version_of
from sfmodel.config import DiTConfig, Preset
from sfmodel.dit import DiT
from sfmodel.machine import commit
from sfmodel.weights.names import to_official

PUBLIC, PATCHED = "public", "public, patched"
KNOWN = (SELF_FORCING, CAUSVID, LONGLIVE)
# The modules of the models and of their attention, in a clone.
MODELS = {
    "wan.modules.causal_model": "wan.modules.attention",
    "causvid.models.wan.causal_model": "causvid.models.wan.wan_base.modules.attention",
}
_OWN = ("wan", "causvid", "utils")  # where a clone's modules are
_TINY = DiTConfig(dim=12, ffn_dim=12, heads=1, layers=1, freq_dim=2, text_dim=1, text_len=1)


class Clone(NamedTuple):
    """model: the class. version: as of `sfkernels.integrations`. note: what it is."""

    model: type[nn.Module]
    version: str
    note: str

    @property
    def rolls(self) -> bool:
        """Tells whether it goes on past the window. CausVid begins anew: where ours would roll, its
        model computes the window's last chunk again, which takes as long."""
        return self.version != CAUSVID

    def streamed(self, ours: DiT, preset: Preset, patched: bool) -> Any:
        """The model under the weights of ours, as a `Stream` takes one. patched: by
        `sfkernels.integrations`."""
        return PublicModel(self, ours, preset, patched)


def load(folder: Path, half: bool) -> Clone:
    """The clone in a folder, of which nothing stays imported but what its model needs. half: it
    will compute in bfloat16 on a GPU. Raises ValueError for other folders and for models that are
    not known or lack a package."""
    files = {name: f"{name.replace('.', '/')}.py" for name in MODELS}
    names = [name for name, file in files.items() if (folder / file).is_file()]
    where, known = (
        f"--public {folder}",
        f"must be a clone of {', '.join(KNOWN[:-1])} or {KNOWN[-1]}",
    )
    if not names:
        raise ValueError(f"{where}: has no {' or '.join(files.values())}: {known}")
    try:
        with _imports(folder, names[0], MODELS[names[0]]):
            attention: Any = importlib.import_module(MODELS[names[0]])
            flash = attention.FLASH_ATTN_2_AVAILABLE or attention.FLASH_ATTN_3_AVAILABLE
            if not (half and flash):
                attention.attention = attention.flash_attention = _sdpa
            model = importlib.import_module(names[0]).CausalWanModel
        version = version_of(_built(model, _TINY).blocks[0], "its block", VERSIONS)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{where}: its model needs {error.name}, which is not installed"
        ) from error
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    except Exception as error:  # whatever other people's code raises
        raise ValueError(f"{where}: its model is not known: {timing.reason(error)}") from error
    if version not in KNOWN:
        raise ValueError(f"{where}: {version} denoises several chunks in one pass: {known}")
    said = [f"{PUBLIC}: {version}'s model at {commit(folder) or 'no known commit'}"]
    said += ["attention by " + ("flash-attn" if half and flash else "SDPA")]
    said += ["a window's last chunk again in place of all after it"] * (version == CAUSVID)
    return Clone(model, version, ", ".join(said))


@contextlib.contextmanager
def _imports(folder: Path, *modules: str) -> Iterator[None]:
    """Finds a clone's modules in a folder; afterwards all is as it was. The packages that they lie
    in are stand-ins, so that no `__init__` imports text encoders and VAEs. No bytecode is written.
    Without a GPU the first one is said to be the current one, as LongLive asks for it."""

    def loaded() -> dict[str, types.ModuleType]:
        return {n: module for n, module in sys.modules.items() if n.partition(".")[0] in _OWN}

    kept, current, writes_none = loaded(), torch.cuda.current_device, sys.dont_write_bytecode
    for name in kept:
        del sys.modules[name]
    for name in (*modules, "utils.memory"):
        while name := name.rpartition(".")[0]:
            package = types.ModuleType(name)
            package.__path__ = [str(folder / name.replace(".", "/"))]
            sys.modules[name] = package
    sys.dont_write_bytecode = True
    if not torch.cuda.is_available():
        torch.cuda.current_device = lambda: 0
    try:
        yield
    finally:
        sys.dont_write_bytecode, torch.cuda.current_device = writes_none, current
        for name in loaded():
            del sys.modules[name]
        sys.modules.update(kept)


def _sdpa(q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor, *_: Any, **__: Any) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q_BLHD, k_BLHD, v_BLHD))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _built(model: type[nn.Module], config: DiTConfig, **options: int) -> Any:
    """A model without memory for its weights, which are given to it later."""
    sizes: Any = dict(
        patch_size=config.patch, text_len=config.text_len, in_dim=config.channels, dim=config.dim,
        ffn_dim=config.ffn_dim, freq_dim=config.freq_dim, text_dim=config.text_dim,
        out_dim=config.channels, num_heads=config.heads, num_layers=config.layers,
        cross_attn_norm=True, eps=config.eps, **options,
    )  # fmt: skip
    with torch.device("meta"):
        made: Any = model(**sizes)
    made.freqs = model(**sizes | {"num_layers": 0}).freqs  # no parameter, but computed
    return made


class _Cache(RingKVCache):
    """A ring whose memory is a public model's cache, and the place in it as that counts it: by
    integers of the host. first: frame of the current chunk. text [1, T, E]: the prompt."""

    text: Tensor

    def __init__(self, **sizes: Any) -> None:
        super().__init__(**sizes)
        self.first = 0
        index: Any = dict(dtype=torch.long, device=self.k.device)
        self.layers = [
            {"k": k, "v": v}
            | {f"{name}_end_index": torch.zeros(1, **index) for name in ("global", "local")}
            for k, v in zip(self.k, self.v, strict=True)
        ]
        self.text_layers: list[dict[str, Any]] = [{"is_init": False} for _ in self.layers]

    def commit(self, frames: int) -> None:
        super().commit(frames)
        self.first += frames

    def reset(self) -> None:
        super().reset()
        self.first = 0
        for layer in self.layers:
            for name in ("global", "local"):
                layer[f"{name}_end_index"].zero_()


class PublicModel:
    """A public model as `sfmodel.stream.Stream` sees ours; what is not of the network is ours."""

    def __init__(self, clone: Clone, ours: DiT, preset: Preset, patched: bool) -> None:
        self._ours, self._rolls = ours, clone.rolls
        rolling = {"local_attn_size": preset.window} if clone.rolls else {}
        self.network = _built(clone.model, ours.config, **rolling).eval()
        self.network.load_state_dict(to_official(ours.state_dict()), assign=True)
        for block in self.network.blocks if clone.rolls else ():
            block.self_attn.max_attention_size = preset.window * math.prod(preset.grid)
        if patched:
            patch(self.network)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ours, name)

    def modulation(self, t: Tensor) -> Tensor:
        """The timestep itself, of which every pass computes its modulation."""
        return t

    def new_cache(
        self, batch: int, window: int, grid: tuple[int, int], sink: int = 0,
        positions: str = "absolute",
    ) -> _Cache:  # fmt: skip
        config, ours = self._ours.config, self._ours
        return _Cache(
            layers=config.layers, batch=batch, window=window, sink=sink, positions=positions,
            frame_tokens=math.prod(grid), heads=config.heads, head_dim=config.head_dim,
            dtype=ours.dtype, device=ours.device,
        )  # fmt: skip

    def set_text(self, cache: _Cache, text_BTE: Tensor) -> None:
        """Makes the next pass compute the prompt's keys and values."""
        cache.text = text_BTE.to(self._ours.dtype)
        for layer in cache.text_layers:
            layer["is_init"] = False

    def __call__(
        self, x_BFCHW: Tensor, t: Tensor, text: None = None, *, cache: _Cache, **_: Any
    ) -> Tensor:
        (batch, frames), tokens = x_BFCHW.shape[:2], cache.frame_tokens
        first = cache.first if self._rolls else min(cache.first, cache.window - frames)
        end = {} if self._rolls else {"current_end": (first + frames) * tokens}
        t_BF = t.expand(batch, frames)
        out_BCFHW = self.network(
            x_BFCHW.to(cache.k.dtype).transpose(1, 2), t=t_BF, context=cache.text,
            seq_len=cache.window * tokens, kv_cache=cache.layers,
            crossattn_cache=cache.text_layers, current_start=first * tokens, **end,
        )  # fmt: skip
        return self._ours.flow(out_BCFHW.transpose(1, 2).float(), x_BFCHW, t_BF)

    append = __call__  # whose output nobody looks at, as in the public pipelines
