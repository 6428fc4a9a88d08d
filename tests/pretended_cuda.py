"""A CUDA device pretended on a CPU build of PyTorch, so that Python that only a GPU runs is tested:

    python -m tests.pretended_cuda -m pytest -m gpu
    python -m tests.pretended_cuda -m bench verify

Tensors report cuda:0 and live on the CPU. As on a GPU, ops that mix devices raise, and so do CPU
tensors handed to Triton, and inside a capture whatever waits: host syncs, copies of memory that is
not pinned. A capture changes nothing; a replay runs what was recorded, and raises where memory that
it uses was freed. Triton runs in its interpreter, Gluon in tests/hopper_emulator.py.

Processes started from such a one have the device too. Not seen: a GPU's numbers, the order of
streams, pools of memory, torch.compile, which returns what it is given. The C++ is compiled at
first use; where there is no compiler, one sentence says so.
"""

from __future__ import annotations

import ctypes
import dataclasses
import hashlib
import itertools
import os
import random
import shutil
import subprocess
import sys
import time
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

ROOT = Path(__file__).parent.parent
SOURCE = Path(__file__).with_suffix(".cpp")
FOLDER = ROOT / "build" / "pretended_cuda"
STARTUP = "from tests import pretended_cuda\n\npretended_cuda.install()\n"
TOTAL = 80 * 2**30  # bytes of memory
FREED = "a graph uses memory that has been freed"
NOT_NOW = "CUDA error: operation not permitted when stream is capturing"


def library() -> Path:
    """The compiled device. Raises OSError where there is no compiler."""
    key = hashlib.sha256(SOURCE.read_bytes() + torch.__version__.encode()).hexdigest()
    made = FOLDER / f"{key[:16]}.so"
    if made.exists():
        return made
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise OSError(f"no CUDA device can be pretended: there is no {compiler} to compile it")
    FOLDER.mkdir(parents=True, exist_ok=True)
    part, root = made.with_suffix(f".{os.getpid()}"), Path(torch.__file__).parent
    options = [f"-I{root}/include", f"-L{root}/lib", "-lc10", "-ltorch_cpu"]
    command = [compiler, "-std=c++20", "-O1", "-shared", "-fPIC", str(SOURCE), *options]
    subprocess.run([*command, "-o", str(part)], check=True)
    return part.rename(made)


class Stream:
    device = torch.device("cuda", 0)
    current: Stream

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def wait_stream(self, other: Stream) -> None: ...
    def wait_event(self, event: Event) -> None: ...
    def record_event(self) -> Event:
        event = Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        wait()


DEFAULT = Stream.current = Stream()


class Event:
    def __init__(self, enable_timing: bool = False, **_: Any) -> None:
        self.timed, self.at = enable_timing, 0.0

    def record(self, stream: Stream | None = None) -> None:
        self.at = time.perf_counter()

    def wait(self, stream: Stream | None = None) -> None: ...
    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        wait()

    def elapsed_time(self, other: Event) -> float:
        if not (self.timed and other.timed and self.at and other.at):
            raise RuntimeError("both events must be recorded, with timing enabled")
        return 1e3 * (other.at - self.at)


class CUDAGraph:
    """underway: captures that the allocator still takes for such. PyTorch 2.11 forgets to tell it
    of the end of one that failed."""

    underway: ClassVar[set[Any]] = set()
    capturing: ClassVar[CUDAGraph]
    lib: Any
    graph: Any = None
    id: Any = None

    def __init__(self, keep_graph: bool = False) -> None:
        self.launches: list[Any] = []
        self.raised: list[BaseException] = []

    def capture_begin(self, pool: Any = (0, 0), **_: Any) -> None:
        if Stream.current is DEFAULT:
            raise RuntimeError("CUDA graphs must be captured on a non-default stream")
        wait()
        self.id = pool if any(pool) else graph_pool_handle()
        self.underway.add(self.id)
        self.graph, CUDAGraph.capturing = self.lib.begin(), self

    def capture_end(self) -> None:
        if not self.lib.end(self.graph):
            self.reset()
            raise RuntimeError("CUDA error: operation failed due to a previous error in capture")
        self.underway.discard(self.id)

    def pool(self) -> Any:
        assert self.graph, "no capture has succeeded"
        return self.id

    def replay(self) -> None:
        assert self.graph, "no capture has succeeded"
        if not self.lib.replay(self.graph):
            raise RuntimeError(FREED)
        if self.raised:
            raise self.raised.pop()

    def keep(self, launch: Callable[[], None]) -> None:
        """Records a launch. What it raises is raised by the replay, as C++ would let it go."""

        def again() -> None:
            try:
                launch()
            except BaseException as error:
                self.raised.append(error)

        self.launches.append(ctypes.CFUNCTYPE(None)(again))
        self.lib.record(self.launches[-1])

    def reset(self) -> None:
        if self.graph:
            self.lib.destroy(self.graph)
        self.graph = None

    __del__ = reset


_POOLS = itertools.count(1)


def graph_pool_handle() -> tuple[int, int]:
    return 0, next(_POOLS)


def wait(device: Any = None) -> None:
    """Waiting of the host for the device."""
    if CUDAGraph.lib.capturing():
        CUDAGraph.lib.refuse()
        raise RuntimeError(NOT_NOW)


def empty_cache() -> None:
    if CUDAGraph.underway:
        raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")


def set_stream(stream: Stream) -> None:
    Stream.current = stream


def end_allocate(device: int, pool: Any) -> None:
    if pool not in CUDAGraph.underway:
        raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
    CUDAGraph.underway.remove(pool)


def launched(run: Callable[..., Any], args: Sequence[Any]) -> None:
    """Runs a kernel on the memory of its tensors, or records it."""
    tensors = [getattr(a, "base", a) for a in args]
    on_gpu = [t.is_cuda for t in tensors if isinstance(t, Tensor)]
    if any(on_gpu):
        for i, t in enumerate(tensors):
            if isinstance(t, Tensor) and not t.is_cuda:
                raise ValueError(f"Pointer argument (at {i}) cannot be accessed from Triton")
        args = [_on_host(a) for a in args]
    with torch.inference_mode():
        run(*args)
    if any(on_gpu) and CUDAGraph.lib.capturing():
        CUDAGraph.capturing.keep(torch.inference_mode()(lambda: run(*args)))


def _on_host(value: Any) -> Any:
    if isinstance(value, Tensor):
        return torch.ops.pretended.launched(value.detach())
    if hasattr(value, "base"):  # a descriptor
        return dataclasses.replace(value, base=_on_host(value.base))
    return value


OPS = torch.library.Library("aten", "IMPL")


def flash_attention(
    q_LHD: Tensor, k_SHD: Tensor, v_SHD: Tensor, q_ends: Tensor, k_ends: Tensor, *_: Any,
    scale: float | None = None, **__: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Attention of the sequences of a batch that lie one after the other."""

    def run(*args: Tensor) -> None:
        q, k, v, out = (t.transpose(0, 1)[None] for t in args[:4])
        for (a, b), (c, d) in zip(*(itertools.pairwise(t.tolist()) for t in args[4:]), strict=True):
            attend = torch.nn.functional.scaled_dot_product_attention
            few = q[:, :, a:b].float(), k[:, :, c:d].float(), v[:, :, c:d].float()
            out[:, :, a:b] = attend(few[0], few[1], few[2], scale=scale)

    out_LHD = torch.empty_like(q_LHD)
    launched(run, (q_LHD, k_SHD, v_SHD, out_LHD, q_ends, k_ends))
    return out_LHD, *(q_LHD.new_empty(0) for _ in range(4))


def addmm_activation(bias: Tensor, a: Tensor, b: Tensor, *, use_gelu: bool = False) -> Tensor:
    """The tanh approximation of GELU, which on a CPU is GELU itself."""
    out = torch.addmm(bias, a, b)
    return torch.nn.functional.gelu(out, approximate="tanh") if use_gelu else out.relu()


def cudnn_attention(
    q_BHLD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, bias: Tensor | None, sums: bool, *_: Any,
    scale: float, **__: Any,
) -> tuple[Any, ...]:  # fmt: skip
    """As cuDNN computes: sums in float32, what the values are multiplied by in their dtype, natural
    logarithms [B, H, L, 1], and an output laid out like the queries."""
    assert bias is None and all(t.stride(-1) == 1 for t in (q_BHLD, k_BHSD, v_BHSD))

    def run(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> None:
        scores = scale * q.float() @ k.float().mT
        lse_BHL1 = scores.logsumexp(-1, keepdim=True)
        most = scores.amax(-1, keepdim=True)
        weights = (scores - most).exp().to(v.dtype).float()
        out.copy_(weights @ v.float() / (lse_BHL1 - most).exp())
        if sums:
            lse.copy_(lse_BHL1)

    out = torch.empty_like(q_BHLD)
    lse = q_BHLD.new_empty(*q_BHLD.shape[:3], 1, dtype=torch.float32) if sums else None
    none = q_BHLD.new_empty(0)
    launched(run, (q_BHLD, k_BHSD, v_BHSD, out, none if lse is None else lse))
    rest = none, none, q_BHLD.shape[2], k_BHSD.shape[2], none, none, none
    return out, none if lse is None else lse, *rest


def patch_triton() -> None:
    import triton.language as tl
    from triton.experimental.gluon._runtime import GluonJITFunction
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    interpret, dot = GridExecutor.__call__, InterpreterBuilder.create_dot

    def wide_dot(self: Any, *args: Any) -> Any:
        """A product of bfloat16 too, whose bits the interpreter multiplies as whole numbers."""
        bits = [getattr(x, "dtype", None) == tl.bfloat16 for x in args]
        return dot(
            self,
            *(self.cast_impl(x, tl.float32) if b else x for x, b in zip(args, bits, strict=True)),
        )

    def call(self: Any, *args: Any, **kwargs: Any) -> None:
        launched(lambda *a: interpret(self, *a, **kwargs), args)

    def emulate(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        from tests.hopper_emulator import run_kernel

        launched(lambda *a: run_kernel(self, grid, a, random.Random(0), **kwargs), args)

    GridExecutor.__call__, GluonJITFunction.run = call, emulate
    InterpreterBuilder.create_dot = wide_dot


def spare_time() -> None:
    """Saves time: what is not asked for by name runs in eager PyTorch, as the interpreter takes
    seconds for a pass of a toy; what is asked for, in few large tiles, as each takes its time."""
    from bench import timing
    from sfkernels import dispatch, launch

    timing.MATMUL, timing.LARGE_COPY, timing.COLD_BYTES, timing.ROUNDS = 64, 2**16, 2**12, 2
    dispatch._AUTO.clear()
    rows = launch.rows

    def larger(kernel: str, device: torch.device, channels: int) -> launch.RowTile:
        setting = rows(kernel, device, channels)
        if kernel in launch.overrides:
            return setting
        most = 8 if kernel.endswith("bwd") else 2**16 // channels  # sums over rows are loops
        return dataclasses.replace(setting, rows=2 ** (most.bit_length() - 1))

    launch.rows = larger


def patch_torch(lib: Any) -> None:
    def always(value: Any) -> Callable[..., Any]:
        return lambda *_, **__: value

    about = types.SimpleNamespace(
        name="pretended H100", major=9, minor=0, total_memory=TOTAL, multi_processor_count=4,
        uuid="00000000-0000-0000-0000-000000000000", L2_cache_size=2**10, warp_size=32,
        is_integrated=0, gcnArchName="", regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048, shared_memory_per_block_optin=232448,
    )  # fmt: skip
    patches = {
        "is_available": always(True), "is_initialized": always(True), "init": always(None),
        "_lazy_init": always(None), "device_count": always(1), "current_device": always(0),
        "set_device": always(None), "_exchange_device": always(0),
        "_maybe_exchange_device": always(0), "get_device_properties": always(about),
        "get_device_capability": always((9, 0)), "get_device_name": always(about.name),
        "is_bf16_supported": always(True), "synchronize": wait, "empty_cache": empty_cache,
        "mem_get_info": lambda *_: (TOTAL - lib.allocated(), TOTAL),
        "memory_allocated": lambda *_: lib.allocated(), "memory_stats": always({}),
        "memory_reserved": lambda *_: lib.allocated(),
        "max_memory_allocated": lambda *_: lib.peak(False),
        "reset_peak_memory_stats": lambda *_: lib.peak(True), "Stream": Stream, "Event": Event,
        "current_stream": lambda *_: Stream.current, "default_stream": always(DEFAULT),
        "set_stream": set_stream, "CUDAGraph": CUDAGraph, "graph_pool_handle": graph_pool_handle,
        "is_current_stream_capturing": lambda: lib.capturing(),
        "set_sync_debug_mode": lambda mode: lib.sync_debug(mode == "error"),
        "default_generators": (torch.Generator("cuda"),),
    }  # fmt: skip
    for name, value in patches.items():
        setattr(torch.cuda, name, value)
    c: Any = torch._C
    c._cuda_endAllocateToPool, c._host_emptyCache = end_allocate, always(None)
    anything: Any = torch
    anything.compile = lambda f=None, **_: f if f is not None else lambda g: g
    anything.version.cuda = "12.8"
    # As PyTorch's own, which asks a storage of the device for itself.
    anything.UntypedStorage.clone = lambda s: torch.empty(
        s.nbytes(), dtype=torch.uint8, device=s.device).untyped_storage().copy_(s)  # fmt: skip
    OPS.impl("_flash_attention_forward", flash_attention, "CUDA")
    OPS.impl("_addmm_activation", addmm_activation, "CUDA")
    OPS.impl("_scaled_dot_product_cudnn_attention", cudnn_attention, "CUDA")
    OPS.impl("_scaled_dot_product_flash_attention", lambda q, k, v, *_, scale, **__:
             cudnn_attention(q, k, v, None, True, scale=scale), "CUDA")  # fmt: skip


def install() -> None:
    """Gives this process the device, and says to Triton that it shall interpret."""
    if "sfkernels.check" not in sys.orig_argv:  # which compiles
        os.environ["TRITON_INTERPRET"] = "1"
    lib = ctypes.CDLL(str(library()))
    for name in ("allocated", "peak"):
        getattr(lib, name).restype = ctypes.c_int64
    for name in ("capturing", "end", "replay"):
        getattr(lib, name).restype = ctypes.c_bool
    lib.begin.restype = ctypes.c_void_p
    for name in ("end", "replay", "destroy"):
        getattr(lib, name).argtypes = [ctypes.c_void_p]
    lib.sync_debug.argtypes = [ctypes.c_bool]
    lib.install()
    torch.set_num_threads(1)  # a second one waits longer than it computes
    CUDAGraph.lib = lib
    patch_torch(lib)
    patch_triton()
    spare_time()


def main() -> int:
    """Runs Python with the arguments given and the device; nothing where there is a real one, which
    needs no such, or no compiler."""
    if torch.cuda.is_available():
        print("a CUDA device is there: none is pretended")
        return 0
    try:
        library()
    except OSError as error:
        print(error, file=sys.stderr)
        return 0
    (FOLDER / "sitecustomize.py").write_text(STARTUP)
    paths = [str(FOLDER), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
