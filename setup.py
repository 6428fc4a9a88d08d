"""Builds the C++ ops of the CPU (csrc/): one library for each instruction set, all or none of them.

None where there is no compiler or no PyTorch, or where the compiler fails: PyTorch computes every
op then, so the installation goes on.
"""

import os
import platform
import re
import runpy
import shutil
import sys
import sysconfig
from importlib.machinery import PathFinder
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError

OLDEST_TORCH = (2, 11)  # whose stable ABI csrc/rows.h asks for; pyproject.toml says the same
FLAGS = "-std=c++20 -O3 -g0 -fPIC "
FLAGS += "-ffp-contract=off "  # or a row's rounding depends on which copy of a loop it is in
FLAGS += "-Wno-psabi -Wno-unknown-pragmas -Wno-ignored-qualifiers "
FLAGS += "-Wno-maybe-uninitialized -Wno-uninitialized -DCPU_CAPABILITY="  # ATen's headers warn
SETS = {"default": "DEFAULT"}
if platform.machine() in ("x86_64", "AMD64"):
    SETS["avx2"] = "AVX2 -DCPU_CAPABILITY_AVX2 -mavx2 -mfma -mf16c"
    SETS["avx512"] = "AVX512 -DCPU_CAPABILITY_AVX512 -mavx512f -mavx512bw -mavx512vl -mavx512dq "
    SETS["avx512"] += "-mfma -mf16c"
# Nothing includes Python.h, but the free-threaded CPython has no stable ABI to name a wheel after.
LIMITED = not sysconfig.get_config_var("Py_GIL_DISABLED")


class BuildOps(build_ext):
    """Leaves out what cannot be built, in one line, and what was built before with it."""

    def run(self) -> None:
        if self.inplace:  # so that no library outlives its sources
            for library in Path("sfkernels").glob("_cpp_*"):
                library.unlink()
        super().run()

    def build_extensions(self) -> None:
        refused = self.refusal()
        if not refused:
            try:
                super().build_extensions()
                return
            except (CompileError, LinkError):
                refused = "the compiler failed, as said above"
        line = f"The C++ ops are not built: {refused}. Everything works without, through PyTorch."
        print(line, file=sys.stderr)
        for output in self.get_outputs():
            Path(output).unlink(missing_ok=True)
        self.extensions = self.distribution.ext_modules = []
        self.distribution.get_command_obj("bdist_wheel").root_is_pure = True

    def refusal(self) -> str:
        """Why there is no use in trying. Points the compiler to PyTorch if there is."""
        if sys.platform == "win32":
            return "they are written for GCC and Clang"
        # Not imported and not required to build: pip would download another PyTorch for that. Build
        # isolation takes it off sys.path, but not out of the environment.
        folders = [*sys.path, *map(sysconfig.get_path, ("purelib", "platlib"))]
        spec = PathFinder.find_spec("torch", folders)
        if not spec or not spec.origin:
            return "the environment has no PyTorch"
        torch = Path(spec.origin).parent
        version = runpy.run_path(str(torch / "version.py"))["__version__"]
        if tuple(map(int, version.split(".")[:2])) < OLDEST_TORCH:
            return f"PyTorch {version} is older than {'.'.join(map(str, OLDEST_TORCH))}"
        compiler = self.compiler.compiler_so_cxx[0]
        if not shutil.which(compiler):
            return f"there is no compiler '{compiler}' (CXX names another)"
        for extension in self.extensions:
            # Last, to have the last word over the flags above.
            own = os.environ.get("CXXFLAGS", "").split()
            extension.extra_compile_args += ["-isystem", str(torch / "include"), *own]
            extension.library_dirs.append(str(torch / "lib"))
        return ""


# Without its pictures, which lie in the repository: PyPI shows none by a relative link.
README = re.sub(
    r"^!\[.*\]\((?!https:).*\)\n\n?", "", Path("README.md").read_text("utf-8"), flags=re.M
)

setup(
    long_description=README,
    long_description_content_type="text/markdown",
    cmdclass={"build_ext": BuildOps},
    ext_modules=[
        Extension(
            f"sfkernels._cpp_{name}",
            sorted(map(str, Path("csrc").glob("*.cpp"))),
            depends=[*map(str, Path("csrc").glob("*.h")), "setup.py"],
            extra_compile_args=(FLAGS + flags).split(),
            libraries=["torch_cpu"],
            language="c++",
            py_limited_api=LIMITED,
        )
        for name, flags in SETS.items()
    ],
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if LIMITED else {},
)
