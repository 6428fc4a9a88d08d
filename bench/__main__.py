"""`python -m bench COMMAND [--help]`: what is measured here.

--quick      all that is timed, at toy sizes: under two minutes on a CPU (default without a GPU)
--gpu        all that is timed, at real size, within eight minutes (default with a GPU)
--full       the same with time for every row and peer, after --verify
--verify     tests, ahead-of-time checks and compute-sanitizer on a GPU

kernels      every op beside eager PyTorch, torch.compile, SDPA, FlexAttention and other libraries
stream       frames a second and latency, with their breakdown, beside the paper's Table 1
decode       the video VAEs beside diffusers', chunk by chunk
extrapolate  past the window: a ring beside the two ways of doing without one (Figure 3)
serve        several streams, one after the other, in one batch, and served to clients
cpu          the ops in C++ beside eager PyTorch and torch.compile, on this CPU
train        seconds per training iteration (Figure 6)
predict      what arithmetic says of all this, for any GPU, size and number of GPUs
report       an HTML page and figures from a file of results
compare      two files of results: what got faster or slower beyond noise
readme       writes the newest results into README.md
experiment   teacher, diffusion and self forcing trained and compared in the toy world
wall-clock   their quality by seconds of training (Figure 6, right half)
long         streams of 30 times the training length, by training and sink
demo         a streamed toy video and what it cost
tune         searches launch settings on this GPU and writes sfkernels/tuned/sm_XX.json
"""

import importlib
import sys

from bench import PARTS
from sfmodel.extras import require
from sfmodel.process import prepared

SUITES = ("quick", "gpu", "full", "verify")
COMMANDS = {
    "report": "bench.report",
    "compare": "bench.compare",
    "tune": "bench.tune",
    "readme": "docs.readme",
}
# Functions whose arguments tyro reads.
FUNCTIONS = {
    "demo": "experiments.demo",
    "experiment": "experiments.table2",
    "long": "experiments.long",
    "predict": "sfmodel.cli.predict",
    "wall-clock": "experiments.wall_clock",
}


def main(arguments: list[str]) -> int:
    """The exit code: 2 and one sentence for bad input and for a file that cannot be written."""
    if not arguments:
        import torch

        arguments = ["gpu" if torch.cuda.is_available() else "quick"]
    command = arguments[0].removeprefix("--")
    if command in ("help", "h", "-h"):
        print(__doc__)
        return 0
    if command not in (*SUITES, *PARTS, *COMMANDS, *FUNCTIONS):
        known = ", ".join((*(f"--{name}" for name in SUITES), *PARTS, *COMMANDS, *FUNCTIONS))
        print(f"python -m bench: no command {arguments[0]!r}, must be one of {known}",
              file=sys.stderr)  # fmt: skip
        return 2
    require("python -m bench", "model" if command in ("cpu", "readme", *FUNCTIONS) else "bench")
    if command in FUNCTIONS:
        from sfmodel.cli.main import run_command

        function = getattr(importlib.import_module(FUNCTIONS[command]), command.replace("-", "_"))
        run_command("python -m bench", {command: function}, [command, *arguments[1:]])
        return 0
    program = f"python -m bench {'--' * (command in SUITES)}{command}"
    try:
        if command in SUITES:
            from bench import suite

            return suite.main([command, *arguments[1:]])
        if command in PARTS:
            from bench import harness

            return harness.command(command, arguments[1:])
        return int(importlib.import_module(COMMANDS[command]).main(arguments[1:]))
    except (ValueError, OSError) as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    with prepared():
        try:
            code = main(sys.argv[1:])
        except KeyboardInterrupt:
            code = 130
    sys.exit(code)
