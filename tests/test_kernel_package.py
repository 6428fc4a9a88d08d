"""The package for Hugging Face's kernels, loaded by them: beside the installed one, and where that
is not, nor NumPy."""

from __future__ import annotations

import errno
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import kernels
import pytest
import torch
import torch.nn.functional as F
from kernels._rust import Digest, DigestAlgorithm
from packaging.requirements import Requirement
from torch import Tensor, nn

import sfkernels
from tests.oracle import DEVICE
from tools import kernel_package

ROOT = Path(__file__).parent.parent
VARIANT = Path("build", "torch-universal")
METADATA = VARIANT / "metadata.json"


def run_tool(out: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-I", "-S", str(ROOT / "tools" / "kernel_package.py"), str(out)]
    return subprocess.run(command, cwd="/", capture_output=True, text=True)


# Of a whole process: a package that is loaded twice lacks what its first copy has imported, and
# workers that take each other's tests may come back to this file.
@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("hub") / "kernel-package"
    done = run_tool(out)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="session")
def sf(package: Path) -> Any:
    return kernels.get_local_kernel(package)


def results(sf: Any, impl: str) -> list[Any]:
    """What attention over a ring, attention in training and AdaLN give, and gradients."""
    torch.manual_seed(0)
    heads, dim, grid = 2, 8, (2, 3)
    qkv, weight = torch.randn(1, 6, 3 * heads * dim), torch.randn(heads * dim)
    sizes = dict(layers=1, batch=1, window=3, sink=1, frame_tokens=6, heads=heads, head_dim=dim)
    cache = sf.RingKVCache(**sizes, dtype=torch.float32)
    at, ring = cache.chunk(1), (cache.k[0], cache.v[0])
    table = sf.rope_table(at.frame_F, grid, dim, impl=impl)
    q = sf.qk_norm_rope_append(qkv, weight, weight, table, *ring, at.slot_F, impl=impl)
    out = sf.ring_attention(q, *ring, at.valid, semaphores=cache.semaphores, impl=impl)
    leaves = [torch.randn(1, 6, 16).requires_grad_(), *torch.randn(2, 1, 2, 16).requires_grad_()]
    qkv_BLHD = [leaves[0].unflatten(-1, (heads, dim))] * 3
    causal = sf.block_causal_attention(*qkv_BLHD, sf.BlockLayout((1, 1), 3), impl=impl)
    normed = sf.adaln(*leaves, impl=impl)
    grads = torch.autograd.grad(causal.square().sum() + normed.square().sum(), leaves)
    return [out, causal.detach(), normed.detach(), *grads]


def isolated(folder: Path, names: list[str]) -> Path:
    """A folder with links to installed packages: to these and to what they require."""
    folder.mkdir()
    seen: set[str] = set()
    while names:
        try:
            found = distribution(names.pop())
        except PackageNotFoundError:  # what is optional, and CUDA's to a PyTorch without
            continue
        if found.name in seen:
            continue
        seen.add(found.name)
        required = map(Requirement, found.requires or ())
        names += [r.name for r in required if not r.marker or r.marker.evaluate({"extra": ""})]
        for top in {file.parts[0] for file in found.files or ()} - {"..", "__pycache__"}:
            if not (folder / top).exists():
                (folder / top).symlink_to(str(found.locate_file(top)))
    return folder


# With -I and -S the path has neither the folder of the tests nor what is installed.
FRESH = """
import sys
sys.path.append({site!r})
from importlib.util import find_spec
from pathlib import Path
from typing import Any
assert [name for name in ("sfkernels", "sfmodel", "numpy") if find_spec(name)] == {there}
import torch, kernels
sf = kernels.get_local_kernel(Path({package!r}))
{results}
{code}
torch.save(out, {out!r})
"""


def run_fresh(package: Path, folder: Path, numpy: bool, code: str, **environment: str) -> Any:
    """What `code` leaves in `out` where PyTorch, Triton, kernels and perhaps NumPy are installed
    and nothing else."""
    there = ["numpy"] * numpy
    script = FRESH.format(
        site=str(isolated(folder / "site", ["torch", "triton", "kernels", *there])),
        there=there,
        package=str(package),
        results=inspect.getsource(results),
        code=code,
        out=str(folder / "out.pt"),
    )
    env = os.environ | {"HF_HUB_OFFLINE": "1", "TRITON_INTERPRET": "0"} | environment
    command = [sys.executable, "-I", "-S", "-c", script]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "out.pt")


EXAMPLES = """
torch.testing.assert_close(y, torch.nn.functional.rms_norm(x, [1536], eps=1e-6))
assert model.forward.__func__ is sf.layers.RMSNorm.forward
out = results(sf, "auto")
"""


def test_pytorch_triton_and_kernels_are_enough(package: Path, tmp_path: Path) -> None:
    """For the examples of its documentation, too."""
    text = (package / "README.md").read_text()
    examples = re.findall(r"```python\n(.*?)```", text, re.S)
    code = "\n".join(["model = torch.nn.RMSNorm(8)", *examples, EXAMPLES])
    code = code.replace("out/kernel-package", str(package)).replace('"cuda"', '"cpu"')
    found = run_fresh(package, tmp_path, False, code)
    torch.testing.assert_close(found, results(sfkernels, "reference"))


TRITON = """
out = results(sf, "triton")
x, scale = torch.randn(1, 4, 8, requires_grad=True), torch.randn(1, 2, 8, requires_grad=True)
norm, rope = sf.sfkernels.norm, sf.sfkernels.rope
for op, args in [
    (norm._norm, (x, scale, scale, 1e-6, True, True, "triton")),
    (norm._residual_norm, (x, x, scale, scale, scale, 1e-6, True, "triton")),
    (rope._rope_table, (torch.arange(2), 2, 3, 8, 1e4, "triton")),
]:
    torch.library.opcheck(op.registered, args)
"""


def test_its_triton_kernels_and_registered_ops(package: Path, tmp_path: Path) -> None:
    found = run_fresh(package, tmp_path, True, TRITON, TRITON_INTERPRET="1")
    torch.testing.assert_close(found, results(sfkernels, "reference"), rtol=1e-4, atol=1e-5)


def test_the_metadata_is_what_kernels_reads(package: Path, sf: Any) -> None:
    (metadata,) = (k.metadata for k in kernels.get_loaded_kernels() if k.module is sf)
    metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, package / VARIANT))
    assert (str(metadata.name), metadata.version) == ("sfkernels", 0)
    assert metadata.id == sf.__name__ and sf.__version__ == sfkernels.__version__
    assert sf.sfkernels.launch.tuned(90) == sfkernels.launch.tuned(90) != {}


def test_it_shares_a_process_with_others(package: Path, sf: Any, tmp_path: Path) -> None:
    """With the installed package, and with a version that differs."""
    other = tmp_path / "other"
    shutil.copytree(package, other)
    text = (other / METADATA).read_text()
    (other / METADATA).write_text(text.replace(sf.__name__, "_sfkernels_other"))
    x, weight = torch.randn(2, 3, 8, device=DEVICE), torch.randn(8, device=DEVICE)
    wanted = sfkernels.rms_norm(x, weight, impl="triton")
    for loaded in (sf, kernels.get_local_kernel(other)):
        assert {*loaded.__all__} == {*sfkernels.__all__}
        assert loaded.rms_norm is not sfkernels.rms_norm
        op = getattr(torch.ops, loaded.__name__).norm.default
        assert op is loaded.sfkernels.norm._norm.registered._opoverload
        found = loaded.rms_norm(x, weight, impl="triton")
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    assert torch.ops.sfkernels.norm.default is sfkernels.norm._norm.registered._opoverload


class RMSNorm(nn.RMSNorm): ...


class LayerNorm(nn.LayerNorm): ...


class LlamaRMSNorm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(size)), 1e-3

    def forward(self, hidden_states: Tensor) -> Tensor:
        size = [*self.weight.shape]
        return F.rms_norm(hidden_states, size, self.weight, self.variance_epsilon)


@kernels.use_kernel_forward_from_hub("AdaLN")
def adaln(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift


@kernels.use_kernel_forward_from_hub("GatedAdaLN")
def gated_adaln(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    x = x + gate * y
    return x, F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift


@kernels.use_kernelized_func(adaln, gated_adaln)
class Modulated(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.modulation = nn.Parameter(torch.ones(3, 1, 1, size))

    def forward(self, x: Tensor) -> Tensor:
        gate, shift, scale = self.modulation.unbind()
        out = adaln(x, shift, scale)
        return torch.cat(gated_adaln(x, out, gate, shift, scale, eps=1e-3))


for layer in (RMSNorm, LayerNorm, LlamaRMSNorm):
    kernels.replace_kernel_forward_from_hub(layer, layer.__name__)


@pytest.mark.parametrize(
    "make",
    [
        lambda: RMSNorm(16),
        lambda: RMSNorm((3, 16), eps=1e-3),
        lambda: RMSNorm(16, elementwise_affine=False),
        lambda: LayerNorm(16),
        lambda: LayerNorm((3, 16), bias=False),
        lambda: LayerNorm(16, eps=1e-3, elementwise_affine=False),
        lambda: LlamaRMSNorm(16),
        lambda: Modulated(16),
    ],
)
def test_layers_replace_forwards(package: Path, sf: Any, make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    layer, x = make().to(DEVICE), torch.randn(2, 3, 16, device=DEVICE, requires_grad=True)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    leaves = x, *layer.parameters()

    def run(layer: Callable[[Tensor], Tensor]) -> list[Tensor]:
        out = layer(x)
        upstream = torch.arange(1.0, 1 + out.numel(), device=DEVICE).sin().view_as(out)
        return [out, *torch.autograd.grad(out, leaves, upstream)]

    wanted = run(layer)
    names = ["RMSNorm", "LayerNorm", "LlamaRMSNorm", "AdaLN", "GatedAdaLN"]
    ours = {
        name: {DEVICE: kernels.LocalLayerRepository(package, layer_name=name)} for name in names
    }
    mode = kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE
    with kernels.use_kernel_mapping(ours, inherit_mapping=False):
        kernels.kernelize(layer, mode=mode, device=DEVICE, use_fallback=False)
    replaced: list[Any] = [adaln, gated_adaln] if isinstance(layer, Modulated) else [layer]
    for of in replaced:
        assert of.forward.__func__ is getattr(sf.layers, of.kernel_layer_name).forward
    torch.testing.assert_close(run(layer), wanted, rtol=1e-4, atol=1e-5)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled), wanted, rtol=1e-4, atol=1e-5)


def test_layers_keep_the_dtype_and_refuse_other_shapes() -> None:
    x = torch.randn(2, 16, device=DEVICE).bfloat16() * 1e-3  # so small that epsilon counts
    ours: Any = sfkernels.layers
    torch.testing.assert_close(
        ours.RMSNorm.forward(RMSNorm(16, device=DEVICE), x), F.rms_norm(x, [16])
    )
    with pytest.raises(ValueError, match=r"x has shape \[2, 16\]: must end in \[8\]"):
        ours.LayerNorm.forward(LayerNorm(8, device=DEVICE), x)


@pytest.mark.parametrize(
    ("file", "source", "wanted"),
    [
        ("a.py", "from sfkernels import x  # of a", "from . import x  # of a"),
        ("a.py", "µ = 1; from sfkernels.b import x", "µ = 1; from .b import x"),
        ("gpu/a.py", "def f():\n  from sfkernels.b.c import (\n    x,\n  )",
         "def f():\n  from ..b.c import (\n    x,\n  )"),
        ("gpu/__init__.py", "from sfkernels.gpu.b import x", "from ..gpu.b import x"),
        ("a.py", "s = '''\nfrom sfkernels import x\n'''", "s = '''\nfrom sfkernels import x\n'''"),
        ("a.py", "from sfkernels_b import x", "from sfkernels_b import x"),
    ],
)  # fmt: skip
def test_imports_become_relative(file: str, source: str, wanted: str) -> None:
    assert kernel_package.relative(source, Path(file)) == wanted


@pytest.mark.parametrize("source", ["import os, sfkernels.b as b", "from \\\n sfkernels import b"])
def test_an_import_without_a_relative_form_is_refused(source: str) -> None:
    with pytest.raises(ValueError, match=r"sfkernels/a.py, line 1: must be 'from sfkernels"):
        kernel_package.relative(source, Path("a.py"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def test_a_package_takes_the_place_of_an_older_one(tmp_path: Path) -> None:
    """That was used, through a link to its folder; the same sources give the same bytes."""
    out, link = tmp_path / "deep" / "out", tmp_path / "link"
    link.symlink_to(out)
    assert run_tool(link).returncode == 0
    first, entry = contents(out), out / VARIANT / "__init__.py"
    entry.write_text("of an older version")
    (entry.parent / "__pycache__").mkdir()
    (entry.parent / "__pycache__" / "of.pyc").write_text("")
    assert run_tool(link).returncode == 0
    assert contents(out) == first and link.is_symlink() and [*out.parent.iterdir()] == [out]


OURS = {"name": "sfkernels", "digest": {"files": {"a": ""}}}


@pytest.mark.parametrize(
    ("made", "said"),
    [
        ({"out": "mine"}, "out is a file: name a folder"),
        ({"out/README.md": "mine"}, "out has README.md, which is not of a package: name another"),
        ({f"out/{METADATA}": '{"name": "another"}'}, f"out has {METADATA}, which is not of a"),
        ({f"out/{METADATA}": json.dumps(OURS), f"out/{VARIANT}/a": "", "out/.git/HEAD": "mine"},
         "out has .git/HEAD, which is not of a package"),
    ],
)  # fmt: skip
def test_what_is_not_a_package_stays(made: dict[str, str], said: str, tmp_path: Path) -> None:
    for name, text in made.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    before = contents(tmp_path)
    done = run_tool(tmp_path / "out")
    assert done.returncode == 2 and contents(tmp_path) == before
    assert done.stderr.startswith(f"kernel_package.py: {tmp_path}/{said}")
    assert done.stderr.count("\n") == 1


def test_a_write_that_fails_leaves_what_was_there(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, rename = tmp_path / "out", Path.rename
    shutil.copytree(package, out)
    before = contents(tmp_path)

    def fail(path: Path, target: Path) -> Path:
        if path.name == "new":
            raise OSError(errno.EIO, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="Input/output error"):
        kernel_package.write(out)
    assert contents(tmp_path) == before
