"""`python -m bench demo`: everything measured here. Without a command, all of it."""

import sys

from bench.demo import demo
from sfmodel.cli import run_command

run_command("python -m bench", {"demo": demo}, sys.argv[1:] or ["demo"])
