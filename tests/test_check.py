"""The ahead-of-time check: no kernel is forgotten, bounds hold, and a broken one is reported.

It compiles in processes of its own: where these tests run in Triton's interpreter, the kernels that
they import cannot be compiled.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import pkgutil
import subprocess
from pathlib import Path

import pytest
import torch

import sfkernels.gpu.hopper
from sfkernels import launch
from sfkernels.bounds import ahead_of_time
from sfkernels.check import Compiled, judge, kernel_name, main, read_ptx, read_sass, read_usage

SASS = """
 Function _norm_fwd_kernel:
  REG:40 STACK:8 SHARED:0 LOCAL:0 CONSTANT[0]:464 TEXTURE:0 SURFACE:0 SAMPLER:0
        /*0000*/                   MOV R1, c[0x0][0x28] ;                  /* 0x00000a0000017a02 */
                                                                           /* 0x000fe40000000f00 */
        /*0010*/                   STL [R1], R14 ;                         /* 0x0000000e01007387 */
        /*0020*/              @!P1 LDG.E.128 R8, [R2.64+0x1000] ;          /* 0x0010001002089981 */
        /*0030*/               @P0 LDG.E.U16.CONSTANT R8, [R2.64] ;        /* 0x0010001002089981 */
        /*0040*/                   LDL.LU R14, [R1] ;                      /* 0x0000000e01007387 */
        /*0050*/                   DFMA R2, R4, R6, R8 ;                   /* 0x0000000e01007387 */
        /*0060*/                   F2F.F64.F32 R2, R4 ;                    /* 0x0000000e01007387 */
        /*0070*/              @!P5 BRA 0x30 ;                              /* 0xffffffec00b4d947 */
        /*0080*/                   HMMA.16816.F32.BF16 R4, R8, R6, R4 ;    /* 0x0000000e01007387 */
        /*0090*/                   STG.E desc[UR16][R2.64], R20 ;          /* 0x0000001402007986 */
        /*00a0*/                   EXIT ;                                  /* 0x000000000000794d */
        /*00b0*/                   BRA 0xb0;                               /* 0xfffffffc00fc7947 */
"""


def run_check(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([*map(str, arguments)])
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def test_every_launcher_has_a_case() -> None:
    every = ahead_of_time()
    hopper = {f"hopper.{name}" for name in sfkernels.gpu.hopper.__all__}
    # What a backward pass of attention launches first has no case of its own.
    assert {one.launcher for one in every} == {*sfkernels.gpu.__all__} - {"row_delta"} | hopper
    names = [(one.launcher, one.name) for one in every]
    assert len(names) == len(set(names))


def test_every_kernel_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Public functions on meta tensors launch each; a backward pass none of its forward pass."""
    launched: list[str] = []
    monkeypatch.setattr(
        launch, "recorder", lambda kernel, *_, **__: launched.append(kernel_name(kernel))
    )
    every = set()
    for one in ahead_of_time():
        launched.clear()
        one.case.launch(one.impl, torch.device("meta"))
        every |= {*launched}
        assert launched and one.case.backward == one.launcher.endswith("_bwd")
        assert not (one.case.backward and any(name.endswith("fwd") for name in launched))
    there = {
        name.strip("_").removesuffix("_kernel")
        for module in pkgutil.walk_packages(sfkernels.gpu.__path__, "sfkernels.gpu.")
        for name in vars(importlib.import_module(module.name))
        if name.startswith("_") and name.endswith("_kernel")
    }
    assert every == there and len(there) > 15


def test_what_is_read_from_sass() -> None:
    out = Compiled("norm_fwd", "case", "norm_fwd", 90, warps=4)
    read_usage(SASS, out)
    read_sass(SASS, out)
    assert (out.registers, out.stack, out.local, out.looped) == (40, 8, 2, 1)
    assert (out.loads, out.stores) == ({128: 1, 16: 1}, {32: 1})
    assert (out.fp64, out.tensor_core) == (2, 1)
    assert out.resident == 48  # 12 programs of 4 warps x 32 threads x 40 registers


HOPPER_SASS = """
        /*0000*/                   UTMALDG.2D [UR8], [UR4], desc[UR16] ;    /* 0x00000a0000017a02 */
        /*0010*/                   MUFU.EX2 R3, R3 ;                        /* 0x00000a0000017a02 */
        /*0020*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], !UPT, gsb0 ;  /* 0x0 */
        /*0030*/                   MUFU.EX2 R4, R4 ;                        /* 0x00000a0000017a02 */
        /*0040*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;          /* 0x00000a0000017a02 */
        /*0050*/                   MUFU.EX2 R5, R5 ;                        /* 0x00000a0000017a02 */
        /*0060*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;          /* 0x00000a0000017a02 */
        /*0070*/                   MUFU.EX2 R6, R6 ;                        /* 0x00000a0000017a02 */
"""
HOPPER_PTX = """
        setmaxnreg.dec.sync.aligned.u32 24;
        setmaxnreg.inc.sync.aligned.u32 240;
        wgmma.wait_group.sync.aligned 1;
        wgmma.wait_group.sync.aligned 0;
        wgmma.wait_group.sync.aligned 1;
"""


def test_what_is_read_of_a_kernel_in_gluon() -> None:
    out = Compiled("hopper_fwd", "case", "hopper.attention_fwd", 90, warps=12, gluon=True)
    read_sass(HOPPER_SASS, out)
    read_ptx(HOPPER_PTX, out)
    assert (out.tensor_core, out.beside) == (1, 2)
    assert (out.waits, out.sets_registers) == ({0: 1, 1: 2}, True)
    out.stores = {64: 4}
    assert judge(out, narrow=0) == []  # TMA loads need no others
    out.beside, out.waits, out.sets_registers = 0, {0: 3}, False
    out.warned = ["wgmma pipeline crosses function boundary"]
    said = "; ".join(judge(out, narrow=0))
    for part in (
        "no exponential is computed while a product is under way",
        "ptxas warns: wgmma pipeline crosses",
        "every wait is for all products",
        "the loading warp keeps its registers",
    ):
        assert part in said


def test_spills_count_where_the_time_goes() -> None:
    """In the inner loop around the product, but not in the loop over tiles outside of it."""
    loops = """
        /*0000*/                   LDL R1, [R1] ;                           /* 0x0 */
        /*0010*/                   LDL R1, [R1] ;                           /* 0x0 */
        /*0020*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R2] ;  /* 0x0 */
        /*0030*/              @!P0 BRA 0x20 ;                               /* 0x0 */
        /*0040*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8] ;  /* 0x0 */
        /*0050*/               @P1 BRA 0x10 ;                               /* 0x0 */
        /*0060*/                   STL [R1], R14 ;                          /* 0x0 */
        /*0070*/               @P2 BRA 0x0 ;                                /* 0x0 */
"""
    out = Compiled("hopper_fwd", "case", "hopper.attention_fwd", 90)
    read_sass(loops, out)
    assert (out.local, out.looped) == (3, 1)
    out = Compiled("norm_fwd", "case", "norm_fwd", 90)
    read_sass(loops.replace("HGMMA", "FADD"), out)
    assert (out.local, out.looped) == (3, 3)  # where nothing is multiplied every loop counts


def test_each_bound_is_named() -> None:
    out = Compiled(
        "norm_fwd",
        "case",
        "norm_fwd",
        89,
        warps=16,
        registers=255,
        local=17,
        shared=100 * 1024,
        loads={16: 2},
        stores={128: 1},
        fp64=1,
    )
    said = "; ".join(judge(out, narrow=1))
    for part in (
        "spills: 17 loads and stores of local memory",
        "1 instructions in float64",
        "102400 bytes of shared memory, at most 99 KiB",
        "255 registers x 512 threads",
        "2 global loads of less than 128 bits (2x16), at most 1 allowed",
        "no global loads of 128 bits",
    ):
        assert part in said
    assert "stores of less" not in said
    out.local, out.looped = 2, 0  # parked outside of loops
    assert "spills" not in "; ".join(judge(out, narrow=1))
    out.looped = 1
    assert "1 of them in a loop" in "; ".join(judge(out, narrow=1))
    assert "spills" not in "; ".join(judge(out, narrow=1, may_spill=True))


@pytest.mark.aot
@pytest.mark.slow
def test_shipped_kernels_hold_the_bounds_at_shipped_settings(tmp_path: Path) -> None:
    done = run_check("--json", tmp_path / "check.json")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "check.json").read_text())
    assert {row["launcher"] for row in rows} == {one.launcher for one in ahead_of_time()}
    assert {row["arch"] for row in rows} == {80, 89, 90, 100}


@pytest.mark.aot
def test_a_bad_setting_is_reported_before_it_ships(tmp_path: Path) -> None:
    bad = {"channels": 1536, "rows": 4, "per_thread": 16, "per_sm": 1, "stages": 4}
    good = {"channels": 5120, "rows": 1, "per_thread": 16, "per_sm": 0, "stages": 1}
    file = tmp_path / "sm_90.json"
    file.write_text(json.dumps({"machine": {}, "kernels": {"qk_norm_rope_fwd": [bad, good]}}))
    done = run_check("--kernel", "qk_norm_rope_fwd", "--tuned", file)
    assert done.returncode == 1, done.stdout + done.stderr
    last = done.stdout.splitlines()[-1]
    assert "qk_norm_rope_fwd, " in last and "4680 x 1536" in last and "sm_90, 16 warps: " in last
    assert "bytes of shared memory, at most 227 KiB fit" in last
    assert "sm_80" not in done.stdout  # the file says which architecture it is for


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--kernel", "nrom"], "kernel 'nrom': must be one of norm_fwd, norm_bwd"),
        (["--arch", "75"], "arch 75: must be one of 80, 89, 90, 100"),
        (["--tuned", "nowhere"], "--tuned nowhere: must be a folder or a file named sm_XX.json"),
        (["--tuned", "sm_90.json"], "--tuned sm_90.json: no such file or folder"),
    ],
)
def test_bad_input_exits_2_with_one_sentence(arguments: list[str], said: str) -> None:
    done = run_check(*arguments)
    assert done.returncode == 2
    assert said in done.stderr and len(done.stderr.splitlines()) == 1
