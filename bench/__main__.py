"""`python -m bench demo`: everything measured here. Without a command, all of it."""

from __future__ import annotations

import sys

import tyro

from bench.demo import demo


def main() -> None:
    try:
        tyro.extras.subcommand_cli_from_dict(
            {"demo": demo}, prog="python -m bench", args=sys.argv[1:] or ["demo"]
        )
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, MemoryError) as error:
        print(f"bench: {error}", file=sys.stderr)
        sys.exit(2)


main()
