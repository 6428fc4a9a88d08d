"""The C++ ops' build: what the libraries need, what is said where there are none."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from sfkernels import cpp

ROOT = Path(__file__).parent.parent
LIBRARIES = sorted((ROOT / "sfkernels").glob("_cpp_*.so"))
# PyTorch's stable C interface, the vector math that it exports, and the compiler's runtime.
STABLE = re.compile(r"(aoti_torch|torch|Sleef)_\w+|\w+@+(GLIBC|GLIBCXX|CXXABI|GCC)_[\d.]+")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """This project with one source that no compiler takes, a library from before, and a PyTorch."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for name, text in {
        "csrc/rows.h": "",
        "csrc/ops.cpp": "#error refused",
        "sfkernels/__init__.py": "",
        "sfkernels/_cpp_avx2.abi3.so": "from before",
        "torch/__init__.py": "",
        "torch/version.py": "__version__ = '2.11.0'",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def run_setup(project: Path, *commands: str, **environment: str) -> str:
    """What it says on standard error."""
    pytest.importorskip("setuptools", "77")
    command = [sys.executable, "setup.py", "--quiet", *commands]
    env = os.environ | environment
    done = subprocess.run(command, cwd=project, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.parametrize(
    ("torch", "cxx", "said"),
    [
        ("2.11.0", "/nowhere/c++", "there is no compiler '/nowhere/c++' (CXX names another)"),
        ("2.11.0", "false", "the compiler failed, as said above"),
        ("2.10.1+cpu", "c++", "PyTorch 2.10.1+cpu is older than 2.11"),
    ],
)
def test_without_the_ops_the_package_is_pure_python(
    project: Path, torch: str, cxx: str, said: str
) -> None:
    (project / "torch/version.py").write_text(f"__version__ = '{torch}'")
    line = f"The C++ ops are not built: {said}. Everything works without, through PyTorch."
    assert run_setup(project, "bdist_wheel", CXX=cxx).splitlines().count(line) == 1
    (wheel,) = project.glob("dist/*")
    assert wheel.name == "sfkernels-0.1.0-py3-none-any.whl"
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if "_cpp_" in name]
    assert run_setup(project, "build_ext", "--inplace", CXX=cxx).splitlines().count(line) == 1
    assert not [*project.rglob("_cpp_*")]


def test_the_source_distribution_has_the_sources(project: Path) -> None:
    run_setup(project, "sdist")
    with tarfile.open(next(project.glob("dist/*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"csrc/rows.h", "csrc/ops.cpp", "setup.py"} <= names


@pytest.mark.skipif(not LIBRARIES, reason="the C++ ops are not built")
@pytest.mark.skipif(not shutil.which("nm"), reason="needs nm")
@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name)
def test_a_library_needs_nothing_that_another_pytorch_lacks(library: Path) -> None:
    command = ["nm", "-D", "--undefined-only", "--format=posix", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    symbols = [line.split()[0] for line in done.stdout.splitlines() if line.split()[1] != "w"]
    assert "torch_call_dispatcher" in symbols
    assert [name for name in symbols if not STABLE.fullmatch(name)] == []


def test_importing_compiles_nothing() -> None:
    code = """if True:
        import sys, torch
        def hook(event, arguments):
            if event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork"):
                sys.exit(f"{event} {arguments}")
        sys.addaudithook(hook)
        import sfkernels"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_what_is_said_of_a_library_that_does_not_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpp, "__file__", str(tmp_path / "cpp.py"))
    assert cpp._load() == ("", "they are not built: docs/cpu.md says how")
    (tmp_path / "_cpp_default.abi3.so").write_bytes(b"of another machine")
    loaded, missing = cpp._load()
    assert not loaded
    said = "_cpp_default.abi3.so, perhaps another machine's, does not load: "
    assert missing.startswith(said) and "\n" not in missing and len(missing) > len(said)
    monkeypatch.setattr(cpp, "LOADED", loaded)
    monkeypatch.setattr(cpp, "MISSING", missing)
    assert cpp.summary() == f"C++ ops: none: {missing}; PyTorch computes in their place"
