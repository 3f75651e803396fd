"""The package as it is installed: what it contains, what it imports, and that it works from anywhere."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]


def python(*arguments: str, cwd: Path) -> str:
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy of the sources, so that nothing is left in them."""
    folder = tmp_path_factory.mktemp("package")
    source = folder / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("oscopt", "kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip = ("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder))
    python(*pip, str(source), cwd=folder)
    return next(folder.glob("*.whl"))


def test_contents(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"oscopt"}
    modules = {f"oscopt/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    modules |= {f"oscopt/{path.name}" for path in (ROOT / "oscopt").glob("*.py")} | {
        f"oscopt/{name}" for name in ("py.typed", "page.css", "page.js")
    }
    assert modules <= set(names) and any(name.endswith("LICENSE") for name in names)


def test_works_from_any_directory(wheel, tmp_path):
    target = tmp_path / "site"
    python("-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(wheel), cwd=tmp_path)
    program = f"""
import sys
sys.path.insert(0, {str(target)!r})
import torch
from oscopt import OscGD
import oscopt
assert oscopt.__file__.startswith({str(target)!r})
net = torch.nn.Linear(3, 2)
optimizer = OscGD(net.named_parameters(), lr=0.1, backend="torch")  # compiling takes long
for _ in range(3):
    optimizer.zero_grad()
    net(torch.ones(4, 3)).square().sum().backward()
    optimizer.step()
assert optimizer.correlation.isfinite().all()
print(oscopt.kernels.backend("numba", torch.device("cpu")).NAME)
"""
    assert python("-c", program, cwd=tmp_path).strip() == "numba"


def test_the_version_is_said_once():
    import oscopt

    assert f"## {oscopt.__version__} " in (ROOT / "CHANGELOG.md").read_text()
