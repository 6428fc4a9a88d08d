"""The text encoder of Wan2.1: UMT5-XXL as transformers runs it, and a cache of embeddings on disk.

A stream needs none of its 5.7 B parameters (10.6 GiB in bfloat16) once the prompts are encoded. So
they stay on disk, memory-mapped, until a prompt comes that the cache does not have. They then go to
the GPU if it has room, for as long as that call lasts; if not, the CPU reads them where they are.

Shapes: B sentences, T tokens of one of them, L of the longest, E text_dim.
"""

from __future__ import annotations

import hashlib
import html
import importlib
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sfmodel.extras import needed
from sfmodel.weights import checkpoint
from sfmodel.weights.opening import dtype_name, read_json
from sfmodel.weights.saving import save_tensors
from sfmodel.weights.scaled import stored_dtype

with needed():
    from safetensors import SafetensorError, safe_open

GIB = 2**30
END = 1  # the token that ends every text
SLICES, SLICE = 32, 2**16  # of a large file: what stands for all of it in the encoder's identity

# Official names → those of transformers; of a block's parameters, without `blocks.N.`.
_OFFICIAL = {
    "token_embedding": "shared",
    "norm": "encoder.final_layer_norm",
    "norm1": "layer.0.layer_norm",
    "attn.q": "layer.0.SelfAttention.q",
    "attn.k": "layer.0.SelfAttention.k",
    "attn.v": "layer.0.SelfAttention.v",
    "attn.o": "layer.0.SelfAttention.o",
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
    "norm2": "layer.1.layer_norm",
    "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
    "ffn.fc1": "layer.1.DenseReluDense.wi_1",
    "ffn.fc2": "layer.1.DenseReluDense.wo",
}


def default_cache() -> Path | None:
    """`sfmodel/text` in the user's cache folder; None for a user without a home."""
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return None if caches.startswith("~") else Path(caches) / "sfmodel" / "text"


def clean(sentence: str) -> str:
    """A prompt as the public Wan2.1 cleans it: mojibake repaired, HTML entities read (twice, as
    they are written in captions from the web), white space single. Raises ValueError without
    ftfy."""
    text: str = _library("ftfy").fix_text(sentence)
    return re.sub(r"\s+", " ", html.unescape(html.unescape(text))).strip()


def read_weights(path: Path) -> dict[str, Tensor]:
    """The encoder's tensors under the names of transformers, memory-mapped: of a folder as in
    diffusers' layout (`text_encoder`, in shards or not) or of the official .pth file.

    Raises ValueError with one sentence for other files and for missing ones."""
    state = _opened(path).tensors
    if "token_embedding.weight" in state:
        state = {_from_official(name): tensor for name, tensor in state.items()}
    shared = state.pop("encoder.embed_tokens.weight", None)  # the same tensor by another name
    if shared is not None:
        state.setdefault("shared.weight", shared)
    table = state.get("shared.weight")
    if table is None or table.dim() != 2 or "encoder.final_layer_norm.weight" not in state:
        raise ValueError(f"{path}: not the weights of a UMT5 text encoder")
    return state


def describe(path: Path) -> str:
    """Line on the encoder that `read_weights` finds. Raises ValueError as it does."""
    state = read_weights(path)
    dtypes = sorted({dtype_name(stored_dtype(tensor)) for tensor in state.values()})
    count = sum(tensor.numel() for tensor in state.values())
    return f"a UMT5 text encoder of {count:,} parameters, {' + '.join(dtypes)}"


class UMT5Encoder:
    """Sentences to embeddings, as `sfmodel.toy.text.ToyTextEncoder`.

    weights, tokenizer: as `sfmodel.assets.find` has them. dtype: of weights and arithmetic, and of
    what the cache keeps; the public code computes in bfloat16. cache: a folder, `default_cache()`
    if None; without that either, nothing is kept. Raises ValueError with one sentence where the
    files are not those of an encoder."""

    text_len = 512

    def __init__(
        self,
        weights: Path,
        tokenizer: Path,
        *,
        dtype: torch.dtype = torch.bfloat16,
        cache: Path | None = None,
    ) -> None:
        self.weights, self.tokenizer, self.dtype = weights, tokenizer, dtype
        self.cache = default_cache() if cache is None else cache
        self._state = read_weights(weights)
        self.text_dim: int = self._state["shared.weight"].shape[1]
        if not (tokenizer / "tokenizer.json").is_file():
            raise ValueError(f"{tokenizer}: has no tokenizer.json, which the text encoder needs")

    def __call__(self, sentences: Sequence[str], device: torch.device | str = "cpu") -> Tensor:
        """Embeddings [B, L, E], float32, on `device`. Short sentences end in rows of zeros, which
        stand for padding; what a sentence is encoded as does not depend on the others. The empty
        one is the end token's embedding, which is what the public Wan2.1 takes for "no condition".
        Sentences of more than `text_len` tokens lose the rest, as there, with a warning.

        A GPU also encodes where it has room for the weights, and is left without them. Raises
        ValueError as the class does, and where a library is missing."""
        if isinstance(sentences, str) or not sentences:
            raise ValueError(f"sentences={sentences!r}: must be a list of at least one sentence")
        different = [*dict.fromkeys(sentences)]
        found = dict(zip(different, self.rows(different, device), strict=True))
        rows = [found[sentence].float() for sentence in sentences]
        return pad_sequence(rows, batch_first=True).to(device)

    @torch.no_grad()
    def rows(
        self, sentences: Iterable[str], device: torch.device | str = "cpu"
    ) -> Iterator[Tensor]:
        """The embedding [T, E] of each sentence as it comes, on the CPU in the encoder's dtype: any
        number of them in the memory of one. Raises ValueError as `__call__` does."""
        device = torch.device(device)
        tokenizer = model = None
        keeps = True
        try:
            for text in map(clean, sentences):
                text_TE = self._recall(text)
                if text_TE is None:
                    if model is None:
                        tokenizer, device = self._tokenizer(), self._where(device)
                        model = self._load(device)
                    ids, count = self._tokens(tokenizer, text)
                    # One at a time and without padding: in a batch, what is rounded how would
                    # depend on the other texts.
                    ids_1T = torch.tensor([ids], device=device)
                    text_TE = model(input_ids=ids_1T).last_hidden_state[0].cpu().contiguous()
                    if not text_TE.isfinite().all():
                        raise ValueError(
                            f"{self.weights}: damaged: {text[:60]!r} becomes NaN or infinity"
                        )
                    try:
                        if kept := self._kept(text):
                            save_tensors(kept, {"text": text_TE}, {"tokens": str(count)})
                    except (OSError, ValueError) as error:
                        if keeps:
                            warnings.warn(
                                f"embeddings of prompts are not kept: {error}", stacklevel=2
                            )
                        keeps = False
                yield text_TE
        finally:
            del model
            if device.type == "cuda":
                torch.cuda.empty_cache()

    def _tokenizer(self) -> Any:
        """Tokenizer read by `tokenizers`, as AutoTokenizer of transformers 4 does: that of
        transformers 5 takes a T5 tokenizer's vocabulary and rebuilds the rest."""
        file = self.tokenizer / "tokenizer.json"
        library = _library("tokenizers")
        try:
            tokenizer = library.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises no narrower one
            raise ValueError(f"{file}: not a tokenizer ({_line(error)})") from None
        tokenizer.no_padding()
        tokenizer.no_truncation()
        return tokenizer

    def _tokens(self, tokenizer: Any, text: str) -> tuple[list[int], int]:
        """Tokens that are read, the end token last, and how many the text has."""
        ids: list[int] = tokenizer.encode(text).ids
        rows = len(self._state["shared.weight"])
        if ids[-1:] != [END] or max(ids) >= rows:
            raise ValueError(
                f"{self.tokenizer / 'tokenizer.json'}: not this encoder's tokenizer: texts must "
                f"end in token {END} of {rows}"
            )
        self._tell_if_cut(text, len(ids))
        return [*ids[:-1][: self.text_len - 1], END], len(ids)

    def _tell_if_cut(self, text: str, count: int) -> None:
        if count > self.text_len:
            warnings.warn(
                f"the prompt {text[:60]!r}… has {count:,} tokens: the first {self.text_len} are "
                "used",
                stacklevel=3,
            )

    def _where(self, device: torch.device) -> torch.device:
        """The GPU if its memory has room for the weights and a GiB to compute in, or the CPU."""
        if device.type == "cuda":
            torch.cuda.empty_cache()
            needed = sum(t.numel() for t in self._state.values()) * self.dtype.itemsize + GIB
            if torch.cuda.mem_get_info(device)[0] > needed:
                return device
        return torch.device("cpu")

    def _load(self, device: torch.device) -> Any:
        """transformers' model. On the CPU its parameters are the memory-mapped tensors themselves
        where they have the right dtype: pages that the system reads and drops as it likes."""
        transformers = _library("transformers")
        config = self._config(transformers)
        try:
            with torch.device("meta"):
                model = transformers.UMT5EncoderModel(config)
        except Exception as error:  # the library's checks of a config raise any
            raise ValueError(f"{self.weights}: no model has its config ({_line(error)})") from None
        want, got = model.state_dict(), self._state
        del want["encoder.embed_tokens.weight"]
        wrong = sorted(want.keys() ^ got.keys()) or sorted(
            name for name, tensor in want.items() if tensor.shape != got[name].shape
        )
        if wrong:
            more = f" and {len(wrong) - 1} more" if wrong[1:] else ""
            raise ValueError(
                f"{self.weights}: not a whole UMT5 text encoder: {wrong[0]}{more} missing, "
                "unexpected or of another shape"
            )
        state = {name: tensor.to(device, self.dtype) for name, tensor in got.items()}
        state["encoder.embed_tokens.weight"] = state["shared.weight"]
        model.load_state_dict(state, assign=True)
        return model.eval()

    def _config(self, transformers: Any) -> Any:
        """Configuration of the encoder: a folder's own, or what the official file's shapes say."""
        blocks = {name.split(".")[2] for name in self._state if name.startswith("encoder.block.")}
        if self.weights.is_dir():
            try:
                config = transformers.UMT5Config.from_dict(read_json(self.weights / "config.json"))
                if config.num_layers != len(blocks):
                    raise ValueError(f"num_layers={config.num_layers}: there are {len(blocks)}")
                return config
            except Exception as error:
                raise ValueError(f"{self.weights}/config.json: {_line(error)}") from None
        first = "encoder.block.0.layer"
        try:
            buckets, heads = self._state[
                f"{first}.0.SelfAttention.relative_attention_bias.weight"
            ].shape
            inner = len(self._state[f"{first}.0.SelfAttention.q.weight"])
            d_ff = len(self._state[f"{first}.1.DenseReluDense.wi_0.weight"])
            d_kv = inner // heads
        except KeyError as error:
            raise ValueError(f"{self.weights}: not a whole UMT5 text encoder: no {error}") from None
        except (ValueError, TypeError, ZeroDivisionError):
            raise ValueError(f"{self.weights}: not a UMT5 text encoder: has wrong shapes") from None
        return transformers.UMT5Config(
            vocab_size=len(self._state["shared.weight"]),
            d_model=self.text_dim,
            d_kv=d_kv,
            d_ff=d_ff,
            num_layers=len(blocks),
            num_heads=heads,
            relative_attention_num_buckets=buckets,
        )

    # The cache: a file for each text, whose name stands for the text and for all that makes its
    # embedding.

    def _kept(self, text: str) -> Path | None:
        if self.cache is None:
            return None
        name = hashlib.sha256(f"{self.identity}\n{text}".encode()).hexdigest()
        return self.cache / f"{name}.safetensors"

    def _recall(self, text: str) -> Tensor | None:
        """The embedding [T, E] kept of a text; None where there is none, or a damaged one, or one
        that does not say whether it is of a text that was cut."""
        kept = self._kept(text)
        if kept is None or not kept.is_file():
            return None
        try:
            with safe_open(kept, "pt") as file:
                text_TE: Tensor = file.get_tensor("text")
                unsaid = len(text_TE) if len(text_TE) < self.text_len else -1
                count = int((file.metadata() or {}).get("tokens", unsaid))
        except (OSError, SafetensorError, ValueError):
            return None
        fits = text_TE.dtype == self.dtype and text_TE.shape[1:] == (self.text_dim,)
        if not fits or len(text_TE) != min(count, self.text_len):
            return None
        self._tell_if_cut(text, count)
        return text_TE

    @cached_property
    def identity(self) -> str:
        """A hash of the encoder: of names, sizes and samples of its files (of large ones 32 slices
        from start to end, of which the first holds the header), and of its dtype."""
        digest = hashlib.sha256(f"{self.dtype} {self.text_len}".encode())
        files = [*_opened(self.weights).files, self.tokenizer / "tokenizer.json"]
        if self.weights.is_dir():
            files.append(self.weights / "config.json")
        for path in files:
            size = path.stat().st_size
            digest.update(f"\n{path.name} {size}\n".encode())
            with open(path, "rb") as file:
                if size <= SLICES * SLICE:
                    digest.update(file.read())
                    continue
                for i in range(SLICES):
                    file.seek((size - SLICE) * i // (SLICES - 1))
                    digest.update(file.read(SLICE))
        return digest.hexdigest()


def _opened(path: Path) -> checkpoint.Weights:
    """A file, or a folder's. Raises ValueError as `checkpoint.open_weights` does."""
    if path.is_dir():
        index = path / "model.safetensors.index.json"
        path = index if index.is_file() else path / "model.safetensors"
    return checkpoint.open_weights(path)


def _from_official(name: str) -> str:
    stem, _, leaf = name.rpartition(".")
    parts = stem.split(".", 2)
    if parts[0] == "blocks" and len(parts) == 3 and parts[2] in _OFFICIAL:
        return f"encoder.block.{parts[1]}.{_OFFICIAL[parts[2]]}.{leaf}"
    return f"{_OFFICIAL.get(stem, stem)}.{leaf}"


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ValueError(
            f"the text encoder needs {name}, which is not installed: pip install 'sfkernels[text]'"
        ) from None


def _line(error: Exception) -> str:
    return str(error).split("\n")[0] or type(error).__name__
