"""`python -m bench COMMAND`: what is measured here.

demo       a streamed toy video, and a ring cache beside the two ways of doing without one (default)
kernels    every kernel beside eager PyTorch, torch.compile and PyTorch's own, in one run
attention  attention beside SDPA, FlexAttention and flash-attn, in one run
stream     chunks of the full-size model with random weights, on a GPU
tune       searches launch settings on this GPU and writes sfkernels/tuned/sm_XX.json
gpu        everything that needs a GPU, in one run: tests, checks, sanitizer, times
"""

import importlib
import sys

# Commands that need neither tyro nor a video encoder: they also run where only PyTorch is.
PLAIN = ("kernels", "attention", "stream", "tune", "gpu")

arguments = sys.argv[1:] or ["demo"]
command = arguments[0].removeprefix("--")
if command in PLAIN:
    sys.exit(importlib.import_module(f"bench.{command}").main(arguments[1:]))
if command in ("help", "-h"):
    print(__doc__)
    sys.exit(0)
if command != "demo":
    known = ", ".join(("demo", *PLAIN))
    print(f"python -m bench: no command {arguments[0]!r}, must be one of {known}", file=sys.stderr)
    sys.exit(2)

from bench.demo import demo  # noqa: E402
from sfmodel.cli import run_command  # noqa: E402

run_command("python -m bench", {"demo": demo}, arguments)
