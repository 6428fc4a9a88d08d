"""Writes sfkernels as a repository of the Kernel Hub: `python tools/kernel_package.py OUT` makes a
folder that `kernels.get_local_kernel` loads (docs/kernels-hub.md). Needs Python alone.

It is a universal kernel, the same source without the C++. Its imports are relative, as the Hub
demands: a kernel is imported under an identifier of its own.
"""

from __future__ import annotations

import argparse
import ast
import base64
import contextlib
import hashlib
import json
import os
import re
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NAME = "sfkernels"
VARIANT = Path("build", "torch-universal")
METADATA = VARIANT / "metadata.json"
CARD, LICENSE = Path("README.md"), Path("LICENSE")
FRONT_MATTER = "---\nlibrary_name: kernels\nlicense: apache-2.0\n---\n\n"
ENTRY = f"from .{NAME} import *\nfrom .{NAME} import __all__, __version__\n"
VERSION = 0  # the Hub's number for an interface that may still change
CAPABILITIES = ["8.0+PTX"]  # compiled where it runs: sm_80 and all later


def absolute(source: str) -> list[int]:
    """The lines of the imports of the package, or from it, by its name."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [str(node.module)]
        else:
            continue
        if any(name.split(".")[0] == NAME for name in names):
            found.append(node.lineno)
    return found


def relative(source: str, file: Path) -> str:
    """The source of a module, `file` within the package, with imports of the package made relative.
    Raises ValueError for one that cannot be."""
    lines = source.split("\n")
    for line in absolute(source):
        dots = "." * len(file.parts)
        lines[line - 1] = re.sub(rf"\bfrom {NAME}\b\.?", f"from {dots}", lines[line - 1])
    out = "\n".join(lines)
    for line in absolute(out):
        raise ValueError(f"{NAME}/{file}, line {line}: must be 'from {NAME}… import …' in one line")
    return out


def package() -> dict[Path, bytes]:
    """The files of the repository, by their paths in it: the same source gives the same bytes."""
    files = {Path("__init__.py"): ENTRY.encode()}
    for path in sorted((ROOT / NAME).rglob("*")):
        file = path.relative_to(ROOT / NAME)
        if path.suffix == ".py":
            files[NAME / file] = relative(path.read_text("utf-8"), file).encode()
        elif path.suffix == ".json":
            files[NAME / file] = path.read_bytes()
    digests = {
        file.as_posix(): base64.b64encode(hashlib.sha256(data).digest()).decode()
        for file, data in files.items()
    }
    # Also the namespace of the ops: each content has its own, and any two load in one process.
    identifier = hashlib.sha256(json.dumps(digests).encode()).hexdigest()[:12]
    metadata = {
        "name": NAME,
        "id": f"_{NAME}_{identifier}",
        "version": VERSION,
        "license": "Apache-2.0",
        "python-depends": [],
        # "universal" is none: the one that the kernels are for. Others load the package as well.
        "backend": {"type": "cuda", "archs": CAPABILITIES},
        "digest": {"algorithm": "sha256", "files": digests},
    }
    card = FRONT_MATTER + (ROOT / "docs" / "kernels-hub.md").read_text("utf-8")
    return {
        CARD: card.encode(),
        LICENSE: (ROOT / "LICENSE").read_bytes(),
        METADATA: f"{json.dumps(metadata, indent=2)}\n".encode(),
        **{VARIANT / file: data for file, data in files.items()},
    }


def check_free(out: Path) -> None:
    """Raises ValueError unless `out` is nothing, an empty folder or a package written before to
    which nothing was added."""
    for folder in (out, *out.parents):
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder} is a file: name a folder")
    ours: set[Path] = set()
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        metadata = json.loads((out / METADATA).read_text("utf-8"))
        if metadata["name"] == NAME:
            files = [VARIANT / file for file in metadata["digest"]["files"]]
            ours = {CARD, LICENSE, METADATA, *files}
    for path in sorted(out.rglob("*")):
        file, is_folder = path.relative_to(out), path.is_dir() and not path.is_symlink()
        if not is_folder and file not in ours and "__pycache__" not in file.parts:
            raise ValueError(f"{out} has {file}, which is not of a package: name another folder")


def write(out: Path) -> None:
    """Writes the package to the folder `out`, in the place of one written before, once it is whole.
    Raises ValueError as `check_free`, OSError where it cannot be written."""
    check_free(out)
    files, out = package(), Path(os.path.realpath(out))
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
        new, old = Path(scratch, "new"), Path(scratch, "old")
        for file, data in files.items():
            (new / file).parent.mkdir(parents=True, exist_ok=True)
            (new / file).write_bytes(data)
        if out.exists():
            out.rename(old)
        try:
            new.rename(out)
        except BaseException:
            if old.exists():
                old.rename(out)
            raise


def main() -> int:
    """Command line. Exit code 2 with one sentence where nothing was written."""
    parser = argparse.ArgumentParser(description="Write sfkernels for the Kernel Hub.")
    parser.add_argument("out", type=Path, help="folder to write, new or written before")
    out = parser.parse_args().out
    try:
        write(out)
    except (ValueError, OSError) as error:
        said = f"cannot write {out}: {error.strerror}" if isinstance(error, OSError) else error
        print(f"{parser.prog}: {said}", file=sys.stderr)
        return 2
    print(f"{out}: for kernels.get_local_kernel (docs/kernels-hub.md)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
