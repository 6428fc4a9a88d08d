"""Weights from the Hugging Face Hub, by names such as hf:owner/name, hf:owner/name@revision and
hf:owner/name/file: fetched by huggingface_hub into its own cache, with its token, its progress bars
and its offline mode (HF_TOKEN, HF_HUB_OFFLINE)."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

PREFIX = "hf:"
_NAME = re.compile(r"hf:(?P<repo>[\w.-]+/[\w.-]+?)(?:@(?P<revision>[\w.-]+))?(?:/(?P<file>.+))?")
_STEM = "diffusion_pytorch_model"


def local(path: str | Path) -> Path:
    """The path itself, or where what a hub's name stands for lies in the cache; fetched where it is
    not there yet. Of a repository without a file the weights of its model are taken, or its only
    checkpoint.

    Raises ValueError with one sentence for what is not there, may not be read or does not come."""
    said = str(path)
    return Path(_fetched(said)) if said.startswith(PREFIX) else Path(path)


@functools.cache
def _fetched(said: str) -> str:
    found = _NAME.fullmatch(said)
    if found is None:
        raise ValueError(f"{said}: must be hf:owner/name, hf:owner/name@revision or …/file")
    repo, revision, file = found["repo"], found["revision"], found["file"]
    with _one_sentence(said):
        import huggingface_hub as hub

        if file:
            return str(hub.hf_hub_download(repo, file, revision=revision))
        try:
            files = hub.list_repo_files(repo, revision=revision)
        except Exception as error:
            if isinstance(error, hub.errors.HfHubHTTPError):  # it was reached
                raise
            there = hub.snapshot_download(repo, revision=revision, local_files_only=True)
            files = [str(each.relative_to(there)) for each in Path(there).rglob("*")]
        wanted = weights_among(files)
        if not wanted:
            checkpoints = ", ".join(f for f in files if f.endswith((".safetensors", ".pt", ".pth")))
            what = (
                f"name one of its checkpoints: {checkpoints}" if checkpoints else "holds no weights"
            )
            raise ValueError(f"{said}: {what}")
        paths = [Path(hub.hf_hub_download(repo, f, revision=revision)) for f in wanted]
    # A folder in the layout of diffusers or of Wan2.1, or one file.
    return str(paths[0] if len(paths) == 1 else _root(paths[-1], wanted[-1]))


def weights_among(files: Sequence[str]) -> list[str]:
    """Those of a repository's files that are its model: in a layout that is known, or the only
    checkpoint that there is. Empty where it has to be said."""
    for folder in ("transformer/", ""):
        inside = [f for f in files if re.fullmatch(rf"{folder}{_STEM}[^/]*\.safetensors.*", f)]
        if inside:
            return [*(f for f in (f"{folder}config.json",) if f in files), *inside]
    loras = [f for f in files if re.fullmatch(r"(adapter_model|pytorch_lora_weights)\..*", f)]
    if loras:
        return [*(f for f in ("adapter_config.json",) if f in files), *loras]
    checkpoints = [f for f in files if f.endswith((".safetensors", ".pt", ".pth"))]
    return checkpoints if len(checkpoints) == 1 else []


def _root(path: Path, name: str) -> Path:
    return path.parents[len(Path(name).parts) - 1]


def download(repo: str, files: Sequence[str], folder: Path) -> None:
    """Fetches files of a repository, or all of it, into a folder. What is there already is left,
    and what was begun goes on. Raises ValueError as `local` does."""
    with _one_sentence(repo):
        import huggingface_hub as hub

        if not files:
            hub.snapshot_download(repo, local_dir=folder)
        for file in files:
            hub.hf_hub_download(repo, file, local_dir=folder)


@contextmanager
def _one_sentence(said: str) -> Iterator[None]:
    """Raises what the client raises as a ValueError with one sentence."""
    if find_spec("huggingface_hub") is None:
        raise ValueError(f"{said}: needs huggingface_hub: pip install huggingface_hub")
    import huggingface_hub.errors as errors

    reasons: dict[type[Exception], Any] = {
        errors.GatedRepoError: "may not be read: ask for access there, and set HF_TOKEN",
        errors.RepositoryNotFoundError: "there is no such repository, or HF_TOKEN may not read it",
        errors.RevisionNotFoundError: "there is no such revision",
        errors.RemoteEntryNotFoundError: "there is no such file in the repository",
        errors.LocalEntryNotFoundError: "is not in the cache, and the hub cannot be reached",
        errors.OfflineModeIsEnabled: "is not in the cache, and HF_HUB_OFFLINE is set",
        errors.HFValidationError: "is no name of a repository",
        errors.HfHubHTTPError: "the hub does not answer as it should",
        errors.IncompleteSnapshotError: "is not in the cache as a whole",
    }
    try:
        yield
    except ValueError as error:
        reason = next((why for kind, why in reasons.items() if isinstance(error, kind)), None)
        raise (error if reason is None else ValueError(f"{said}: {reason}")) from None
    except Exception as error:
        reason = next((why for kind, why in reasons.items() if isinstance(error, kind)), None)
        of_client = type(error).__module__.startswith(("httpx", "requests"))
        if reason is None and not of_client and not isinstance(error, OSError):
            raise
        why = reason or (getattr(error, "strerror", None) or "the hub cannot be reached")
        raise ValueError(f"{said}: {why}") from None
