"""`python -m sfmodel` and the command `sfmodel`."""

import sys


def main() -> None:
    """Runs the command line. Exit code 130 for Ctrl-C, also while its libraries are loaded."""
    try:
        from sfmodel.cli.main import main as run
    except KeyboardInterrupt:
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
