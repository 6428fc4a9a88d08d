"""What is built: the C++ ops, what they need and what is said where there are none; the source
distribution, the wheel and the container's image."""

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


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What git has of this one, and its distributions without the C++ ops."""
    command = ["git", "ls-files", "--cached", "--deduplicate"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode or "setup.py" not in done.stdout:
        pytest.skip("is no checkout of git")
    copy = tmp_path_factory.mktemp("build") / "sfkernels"
    for name in done.stdout.splitlines():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    run_setup(copy, "sdist", "bdist_wheel", CXX="/nowhere/c++")
    return copy


def test_the_source_distribution_is_the_checkout(checkout: Path) -> None:
    with tarfile.open(next(checkout.glob("dist/*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    made = ("build", "dist", "sfkernels.egg-info")
    files = (file.relative_to(checkout) for file in checkout.rglob("*") if file.is_file())
    assert {str(f) for f in files if f.parts[0] not in made} - names == {".gitignore"}


def test_the_wheel_has_both_packages_and_nothing_else(checkout: Path) -> None:
    with zipfile.ZipFile(next(checkout.glob("dist/*.whl"))) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        read = {Path(name).name: wheel.read(name).decode() for name in {*wheel.namelist()} - names}
    packages = (checkout / name for name in ("sfkernels", "sfmodel"))
    files = (file for package in packages for file in package.rglob("*") if file.is_file())
    assert names == {str(file.relative_to(checkout)) for file in files}
    assert {"sfkernels/py.typed", "sfkernels/integrations/__init__.py", "sfmodel/py.typed"} <= names
    assert "sfmodel = sfmodel.__main__:main" in read["entry_points.txt"] and "LICENSE" in read
    text = read["METADATA"].partition("\n\n")[2]
    assert "## In your own attention layer" in text and "![" not in text


def test_the_image_has_what_it_copies_and_a_pytorch_that_fits() -> None:
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    steps = [line.split(maxsplit=1) for line in text.splitlines() if line and line[0] != "#"]
    ignored = {*(ROOT / ".dockerignore").read_text().split()}
    copied = {name for what, rest in steps if what == "COPY" for name in rest.split()[:-1]}
    assert {"csrc", "sfkernels", "sfmodel"} <= copied and not copied & ignored
    assert not [name for name in copied if not (ROOT / name).exists()]
    project = (ROOT / "pyproject.toml").read_text()
    oldest = re.search(r'"torch>=(\d+)\.(\d+)"', project)
    image = re.fullmatch(
        r"pytorch/pytorch:(\d+)\.(\d+)\.\d+-cuda13\.\d+-cudnn9-runtime", steps[0][1]
    )
    assert image and oldest and [*map(int, image.groups())] >= [*map(int, oldest.groups())]
    (extras,) = re.findall(r"'\.\[(.*)\]'", text)
    assert not [one for one in extras.split(",") if f"\n{one} = [" not in project]
    users = [rest for what, rest in steps if what == "USER"]
    assert users and users[-1] not in ("0", "root")
    assert ["ENTRYPOINT", '["sfmodel"]'] in steps


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
