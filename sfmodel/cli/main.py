"""The command line: `sfmodel generate | serve | train | evaluate | encode | decode | convert |
predict | doctor`."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from sfmodel.extras import require

require("sfmodel", "model")

import tyro

from sfmodel.cli.convert import convert
from sfmodel.cli.doctor import doctor
from sfmodel.cli.encode import decode, encode
from sfmodel.cli.evaluate import evaluate
from sfmodel.cli.generate import generate
from sfmodel.cli.pipeline import for_stages
from sfmodel.cli.predict import predict
from sfmodel.cli.serve import serve
from sfmodel.cli.train import train_command
from sfmodel.process import prepared


def run_command(
    program: str, commands: dict[str, Callable[..., None]], arguments: Sequence[str]
) -> None:
    """Runs the command that the arguments name. Exit code 2 and one sentence for bad input, 130
    for Ctrl-C and the other `process.STOPS`."""
    with prepared():
        try:
            tyro.extras.subcommand_cli_from_dict(commands, prog=program, args=arguments)
        except KeyboardInterrupt:
            sys.exit(130)
        except (ValueError, OSError, MemoryError, FloatingPointError) as error:
            print(f"{program}: {error}", file=sys.stderr)
            _tell_torchrun(f"{program}: {error}")
            if type(error) is ConnectionError:
                # A rank is lost. Threads that wait for it would abort a process that ends tidily.
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(2)
            sys.exit(2)


def _tell_torchrun(said: str) -> None:
    """Leaves the sentence where torchrun looks for the reason of a failure, to end its report."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        extra = {"py_callstack": said, "timestamp": f"{time.time():.0f}"}
        message = {"message": said, "extraInfo": extra}
        with contextlib.suppress(OSError):
            Path(file).write_text(json.dumps({"message": message}))


def main() -> None:
    """Entry point of `sfmodel`."""
    commands: dict[str, Callable[..., None]] = {
        "generate": generate,
        "serve": serve,
        "train": train_command(sys.argv[1:]),
        "evaluate": evaluate,
        "encode": encode,
        "decode": decode,
        "convert": convert,
        "predict": predict,
        "doctor": doctor,
    }
    run_command("sfmodel", commands, for_stages(sys.argv[1:]))
