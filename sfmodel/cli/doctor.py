"""Report on this machine: its GPUs and libraries, the memory that each preset needs, the public
files that are here, and the command to run next. No weights are read, and nothing is downloaded
that was not asked for."""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import sysconfig
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sfkernels import cpp
from sfmodel import assets, hub
from sfmodel.config import PRESETS
from sfmodel.cost import DECODER_MEMORY, GIB, activations_gib, decoder_gib, memory_gib
from sfmodel.files import atomic, check_writable
from sfmodel.machine import machine
from sfmodel.terminal import plain_console

OLDEST = (8, 0)  # compute capability that the kernels are written for
STREAMS = "wan-1.3b"  # the preset with public few-step weights
NEEDED = ("generators", "vae", "text_encoder", "tokenizer")  # to stream it
WINDOWS = (9, 21)  # latent frames
ENCODER_GIB = 10.6  # 5,680,910,336 parameters
CUDA_GIB = 1.0  # assumed: CUDA's context, its libraries' work space, compiled kernels
PARTS = ("weights", "cache", "activations", "decoder", "total")
# A distribution, what it is for here, what installs it.
LIBRARIES = (
    ("safetensors", "weights", "'sfkernels[model]'"),
    ("av", "MP4 files", "'sfkernels[model]'"),
    ("starlette", "sfmodel serve", "'sfkernels[serve]'"),
    ("transformers", "Wan2.1's text encoder", "'sfkernels[text]'"),
    ("ftfy", "Wan2.1's text encoder", "'sfkernels[text]'"),
    ("diffusers", "models that the benches compare with", "diffusers"),
    ("flash-attn", "attention with impl='flash'", "'sfkernels[flash]'"),
)


def doctor(
    models: Path | None = None,
    json_path: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
    download: bool = False,
) -> None:
    """Say what this machine can run and what to run next.

    Args:
        models: Folder of the public weights; models, or what SFMODEL_MODELS names, if not given.
        json_path: A file for the same as JSON.
        download: Fetch first what streaming at full size still needs, from the Hugging Face Hub.
    """
    if models is not None and not models.is_dir() and not download:
        raise ValueError(f"{models}: there is no such folder of models")
    if json_path is not None:
        check_writable(json_path)
    found = examine(models)
    if download:
        _download(found, Path(found["models"]))
        found = examine(models)
    if json_path is not None:
        with atomic(json_path) as part:
            part.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    report(found, plain_console())


def _download(found: dict[str, Any], folder: Path) -> None:
    """Fetches what STREAMS needs and lacks to where `assets.find` looks. What was begun goes on."""
    for each in found["missing"]:
        if each["preset"] == STREAMS and each["field"] in NEEDED:
            target = folder if each["field"] == "generators" else folder / Path(each["where"]).name
            print(f"{each['name']}: {each['where']}, into {target}", flush=True)
            hub.download(each["where"], each["files"], target)


def examine(models: Path | None) -> dict[str, Any]:
    """Everything that `report` shows, as JSON holds it. models: as in `assets.find`; a folder that
    does not exist holds nothing."""
    folder = assets.default_folder() if models is None else models
    here, files = _machine(folder), []
    with suppress(ValueError):
        files = assets.examine(models)
    found: dict[str, Any] = {
        "machine": here,
        "libraries": [
            {"name": name, "for": use, "version": _version(name), "install": f"pip install {what}"}
            for name, use, what in LIBRARIES
        ],
        "memory": memory(here["gpus"][0]["memory_gib"] if here["gpus"] else None),
        "models": str(folder),
        "files": [{**one._asdict(), "path": str(one.path)} for one in files],
        "known": [
            {
                "name": one.name,
                "preset": one.preset,
                "checkpoint": str(path or f"{hub.PREFIX}{one.where}/{one.file}"),
                "here": path is not None,
                "options": one.flags(),
                "note": one.note,
            }
            for one, path in assets.known(models)
        ],
        "missing": [
            {"preset": preset, "field": field, **assets.PUBLIC[preset][field]._asdict()}
            for preset, field in assets.missing(files)
        ],
    }
    why, command = next_step(found)
    return {**found, "why": why, "next": command}


# --- The machine


def _machine(folder: Path) -> dict[str, Any]:
    sees = torch.cuda.is_available()
    gpus = []
    for i in range(torch.cuda.device_count() if sees else 0):
        about = torch.cuda.get_device_properties(i)
        gpus.append(
            {
                "name": about.name,
                "memory_gib": about.total_memory / GIB,
                "capability": [about.major, about.minor],
                "driver": machine(torch.device("cuda", i))["driver"],
            }
        )
    why = f"this PyTorch, built for CUDA {torch.version.cuda}, finds none"
    here = folder.absolute()
    disk = next(each for each in (here, *here.parents) if each.exists())
    # What Triton compiles the launchers of its kernels with, chosen as it does, and the headers
    # that these include.
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    return {
        "gpus": gpus,
        "no_gpu": why if torch.version.cuda else "this PyTorch is built without CUDA",
        "cpu": machine("cpu")["device"],
        "processors": len(os.sched_getaffinity(0)),
        "memory_gib": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB,
        "disk": str(disk),
        "disk_free_gib": shutil.disk_usage(disk).free / GIB,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "compiler": compiler,
        "cpp": cpp.summary(),
        "python_headers": Path(sysconfig.get_paths(scheme)["include"], "Python.h").is_file(),
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


# --- Memory


def memory(gpu_gib: float | None) -> list[dict[str, Any]]:
    """GiB that a stream needs, a row for each preset, window and decoder: of weights, keys and
    values, a chunk's activations, its decoder, all in bfloat16. Worked out, not measured. fits:
    into `gpu_gib`; None without a GPU."""
    rows = []
    for name, preset in PRESETS.items():
        toy = name == "toy"  # whose decoder is too small to count
        for window in (preset.window,) if toy else WINDOWS:
            sized = replace(preset, window=window)
            kept = memory_gib(sized)
            for decoder in ("its own",) if toy else DECODER_MEMORY:
                parts = [kept["weights"], kept["cache"], activations_gib(sized)]
                parts.append(0.0 if toy else decoder_gib(sized, decoder))
                total = sum(parts) + CUDA_GIB
                row = {"preset": name, "window": window, "by": decoder, "gpu": gpu_gib}
                row |= dict(zip(PARTS, [*parts, total], strict=True))
                rows.append({**row, "fits": None if gpu_gib is None else total < gpu_gib})
    return rows


# --- What to do


def next_step(found: dict[str, Any]) -> tuple[str, str]:
    """Reason for the next step, and its command."""
    toy = 'sfmodel generate --prompt "a small blue ball moves up fast"'
    here, folder = found["machine"], Path(found["models"])
    if not here["gpus"]:
        return f"no GPU ({here['no_gpu']}): the toy model runs on the CPU", toy
    if tuple(here["gpus"][0]["capability"]) < OLDEST:
        return f"GPU 0 is older than the kernels are written for: {_dotted(OLDEST)}", toy
    mine = [each for each in found["files"] if each["usable"] and each["preset"] in (STREAMS, "")]
    usable = {each["field"]: each["path"] for each in reversed(mine)}  # the first of each
    decoder = "taehv" if "tiny_vae" in usable and "vae" not in usable else "wan"
    rows = [row for row in found["memory"] if (row["preset"], row["by"]) == (STREAMS, decoder)]
    window = max((row["window"] for row in rows if row["fits"]), default=None)
    if window is None:
        return f"{STREAMS} does not fit GPU 0: the toy model does", toy
    missing = [n for n in NEEDED if n not in usable and not (n == "vae" and "tiny_vae" in usable)]
    if missing:
        named = ", ".join(assets.PUBLIC[STREAMS][name].name for name in missing)
        return (
            f"{STREAMS} still needs: {named}",
            assets.download_command(missing, STREAMS, folder),
        )
    for each in found["libraries"]:
        if "[text]" in each["install"] and not each["version"]:
            return f"{STREAMS} still needs {each['name']}", each["install"]
    words = ["sfmodel", "generate", "--preset", STREAMS, "--checkpoint", usable["generators"]]
    if window < PRESETS[STREAMS].window:
        words += ["--window", str(window)]
    command = shlex.join([*words, "--prompt", "a cat walks on grass, realistic style"])
    if folder != assets.default_folder():
        command = f"SFMODEL_MODELS={shlex.quote(str(folder))} {command}"
    return f"all that {STREAMS} needs is here", command


# --- Showing it


def report(found: dict[str, Any], console: Console) -> None:
    """Tables in a terminal, aligned text elsewhere."""

    def show(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        table = Table() if console.is_terminal else Table(box=None, pad_edge=False)
        for column in columns:
            numbers = column in (*PARTS, "window")
            table.add_column(column, justify="right" if numbers else "left", overflow="fold")
        for row in rows:
            table.add_row(*map(Text, row))  # a string's brackets would be markup
        plain(f"\n{title}")
        console.print(table)

    def plain(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    for name, value in _machine_rows(found["machine"]):
        plain(f"{name:8} {value}")
    show(
        "Libraries",
        ("name", "version", "for"),
        (
            (each["name"], each["version"] or f"not installed: {each['install']}", each["for"])
            for each in found["libraries"]
        ),
    )
    show(
        "Memory of a stream in GiB, worked out for bfloat16, not measured on a GPU yet; the total "
        f"assumes {CUDA_GIB:g} for CUDA itself",
        ("preset", "window", "decoder by", *PARTS, "GPU 0"),
        (
            (row["preset"], str(row["window"]), row["by"],
             *(f"{row[part]:.1f}" for part in PARTS), _fits(row))
            for row in found["memory"]
        ),
    )  # fmt: skip
    plain(
        f"Before it, the text encoder: {ENCODER_GIB} GiB while new prompts are encoded, on the GPU "
        "where it has room, else on the CPU"
    )
    models = found["models"]
    if found["files"]:
        show(
            f"Found in {models}",
            ("what", "preset", "file", "is"),
            (
                (each["field"], each["preset"], each["path"].removeprefix(f"{models}{os.sep}"),
                 ("" if each["usable"] else "not usable: ") + each["said"])
                for each in found["files"]
            ),
        )  # fmt: skip
    else:
        plain(f"\nFound nothing in {models} (SFMODEL_MODELS or --models names another folder)")
    if found["missing"]:
        show(
            "Missing",
            ("what", "preset", "where", "files"),
            (
                (each["name"], each["preset"], _place(each["where"]),
                 ", ".join(each["files"]) or "all")
                for each in found["missing"]
            ),
        )  # fmt: skip
    show(
        "Known checkpoints, which stream as they were published (docs/models.md)",
        ("checkpoint", "here", "--checkpoint"),
        (
            (each["name"], "yes" if each["here"] else "no", each["checkpoint"])
            for each in found["known"]
        ),
    )
    plain(f"\n{found['why']}. Next:\n\n    {found['next']}")


def _machine_rows(here: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [] if here["gpus"] else [("GPU", f"none: {here['no_gpu']}")]
    for i, gpu in enumerate(here["gpus"]):
        old = tuple(gpu["capability"]) < OLDEST
        words = [
            gpu["name"],
            f"{gpu['memory_gib']:.0f} GiB",
            f"compute capability {_dotted(gpu['capability'])}",
            *([f"too old for the kernels, which need {_dotted(OLDEST)}"] if old else []),
            f"driver {gpu['driver'] or 'unknown'}",
        ]
        rows.append((f"GPU {i}", ", ".join(words)))
    triton = [here["triton"] or "not installed"]
    triton.append(f"compiles with {here['compiler']}" if here["compiler"] else "no C compiler: "
                  "on a GPU it needs one, such as gcc")  # fmt: skip
    if not here["python_headers"]:
        triton.append("no Python.h: on a GPU it needs Python's headers")
    return [
        *rows,
        ("CPU", f"{here['cpu']}, {here['processors']} processors may be used; {here['cpp']}"),
        ("memory", f"{here['memory_gib']:.0f} GiB"),
        ("disk", f"{here['disk_free_gib']:.0f} GiB free in {here['disk']}"),
        ("Python", here["python"]),
        ("PyTorch", f"{here['torch']}, " + (f"CUDA {here['cuda']}" if here["cuda"] else "no CUDA")),
        ("Triton", ", ".join(triton)),
    ]


def _place(where: str) -> str:
    return where if "://" in where else f"{where} on Hugging Face"


def _fits(row: dict[str, Any]) -> str:
    if row["fits"] is None:
        return "none; runs on the CPU" if row["preset"] == "toy" else "none"
    return "fits" if row["fits"] else f"does not fit: {row['total']:.0f} of {row['gpu']:.0f} GiB"


def _dotted(capability: Iterable[int]) -> str:
    return ".".join(map(str, capability))
