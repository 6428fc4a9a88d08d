"""Additions of mkdocs.yml to MkDocs: tables that are computed as the site is built, at
`<!-- table: NAME -->` in a page, and a line of its own for each argument in a docstring."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import griffe

from bench import compare, timing, train
from bench.ops import attention, memory_bound
from bench.tables import number
from docs import readme
from sfkernels.cases import Case
from sfmodel.cli import doctor, predict
from sfmodel.config import PRESETS
from sfmodel.cost import GPUS
from sfmodel.machine import describe
from sfmodel.training_cost import to_first

RESULTS = readme.ROOT / "bench" / "results"
H200 = GPUS["h200"]
CEILINGS = {"matmul_tflops": H200.matmul_tflops, "copy_gbps": 1e3 * H200.copy_tbps}
NOT_MEASURED = "not measured yet"


def cases() -> Iterator[Case]:
    """Those of `bench kernels` at a chunk and a clip of Wan2.1-1.3B."""
    rows, heads = memory_bound.FULL, attention.FULL
    chunk = replace(rows, shapes=rows.shapes[:1], layers=rows.layers[:4])
    clip = replace(heads, rings=heads.rings[:1], clips=heads.clips[:1])
    for found in (
        memory_bound.rows(chunk), attention.rows(clip), memory_bound.convolutions(tiny=False)
    ):  # fmt: skip
        yield from (case for case, _ in found)


def measured() -> tuple[str, dict[str, float]]:
    """Machine and files of the newest results on an H200, and the milliseconds of our fastest by
    the name of the case."""
    found: dict[str, float] = {}
    said, names = "", []
    for name, result in readme.newest(RESULTS):
        if "H200" not in result["machine"]["device"] or result["part"] != "kernels":
            continue
        said = said or describe(result["machine"])
        if describe(result["machine"]) != said:  # of one machine and its versions
            continue
        names.append(f"`bench/results/{name}`")
        for row in result["rows"]:
            times = [
                ms for by, entry in row.get("contestants", {}).items()
                if compare.is_by(compare.OURS, by) and (ms := compare.milliseconds(entry))
            ]  # fmt: skip
            if times:
                found.setdefault(row["case"], min(times))
    return f"{said} ({', '.join(names)})", found


def floors(by_bytes: bool) -> Iterator[str]:
    """The cases whose bytes, or whose products, take longer at the ceilings of an H200."""
    on, times = measured()
    rows = []
    for case in cases():
        floor = timing.floor_ms(case.flops, case.nbytes, CEILINGS)
        if (floor > timing.floor_ms(case.flops, 0, CEILINGS)) != by_bytes:
            continue
        ms = times.get(case.label)
        took = (number(1e3 * ms), f"{100 * floor / ms:.0f}") if ms else (NOT_MEASURED, "")
        sizes = [number(x) for x in (case.nbytes / 1e6, case.flops / 1e9, 1e3 * floor)]
        rows.append((case.label.replace(" x ", " × "), *sizes, *took))
    rates = f"{H200.matmul_tflops:.0f} TFLOP/s in bfloat16 and {H200.copy_tbps:.1f} TB/s"
    yield f"Floors at {rates}." + f" Measured: {on}." * any(row[-1] for row in rows)
    heads = ("", "MB", "GFLOP", "floor, µs", "measured, µs", "floor, % of it")
    yield from readme.table(heads, rows)


def memory() -> Iterator[str]:
    """GiB of a stream, as `sfmodel doctor` says."""
    rows = [
        (row["preset"], str(row["window"]), row["by"], *(f"{row[p]:.1f}" for p in doctor.PARTS))
        for row in doctor.memory(None)
    ]
    yield (
        f"GiB in bfloat16 at 480×832, one stream; the total assumes {doctor.CUDA_GIB:g} for CUDA "
        f"itself. Before it Wan2.1's text encoder needs {doctor.ENCODER_GIB}, on the GPU where it "
        "has room, else on the CPU."
    )
    yield from readme.table(("preset", "window", "decoder by", *doctor.PARTS), rows)


def speed() -> Iterator[str]:
    """Floors of a stream on every GPU that is known, as `sfmodel predict` says."""
    rows = []
    for gpu in GPUS.values():
        for name in predict.MODELS:
            said = predict.prediction(PRESETS[name], gpu)
            fps = [f"{said['fps'][over]['floor']:.3g}" for over in ("full_window", "clip")]
            waits = [
                f"{said['latency_ms'][what]['floor'] / 1e3:.2g}"
                for what in ("first_frame", "reaction")
            ]
            rates = f"{gpu.matmul_tflops:.0f}", f"{gpu.copy_tbps:.2f}"
            rows.append((gpu.name, *rates, name, *fps, *waits))
    heads = ("", "TFLOP/s", "TB/s", "preset", "FPS, full window", "FPS, clip of 81 frames",
             "first frame, s", "reaction, s")  # fmt: skip
    yield from readme.table(heads, rows)


def training() -> Iterator[str]:
    """Seconds of Figure 6 (arXiv 2506.08009) and their floors, as `bench train` says."""
    found = train.bars({"sizes": "", "rows": [], "ceilings": CEILINGS})
    said = [found[by] for by in ("published", "predicted of it", "predicted here")]
    ratios = [to_first(seconds) for seconds in said]
    rows = [
        (name, *(f"{of[name]:.2f}" for pair in zip(said, ratios, strict=True) for of in pair))
        for name in train.UPDATES
    ]
    heads = ("published, s", "to SF-1's", "floor of it, s", "to SF-1's",
             "floor with a score of 1.3B, s", "to SF-1's")  # fmt: skip
    yield from readme.table(("", *heads), rows)


TABLES = {
    "bytes": lambda: floors(by_bytes=True),
    "products": lambda: floors(by_bytes=False),
    "memory": memory,
    "speed": speed,
    "training": training,
}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The page with its tables; called by MkDocs."""
    return re.sub(r"<!-- table: (\w+) -->", lambda found: "\n".join(TABLES[found[1]]()), markdown)


class Lines(griffe.Extension):
    """Keeps a docstring's line of its own for an argument: names and a colon behind a sentence."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = in_lines(obj.docstring.value)


def in_lines(docstring: str) -> str:
    """The docstring with line breaks of Markdown before its arguments."""
    return re.sub(r"(?<=[.;:])\n(?=[\w, ]+(?: \[[^\]\n]*\])?: )", "  \n", docstring)
