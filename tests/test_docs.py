"""The snippets of docs/guide.md, run from top to bottom, and the commands of all pages."""

from __future__ import annotations

import importlib
import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
GUIDE = ROOT / "docs" / "guide.md"
SNIPPET = re.compile(r"(?:<!-- (?P<mark>[^>]*) -->\n)?```python\n(?P<code>.*?)```", re.S)


def snippets() -> list[tuple[int, str, str]]:
    """Line, mark and code of each."""
    text = GUIDE.read_text()
    return [
        (text[: found.start("code")].count("\n"), found["mark"] or "", found["code"])
        for found in SNIPPET.finditer(text)
    ]


@pytest.mark.filterwarnings("ignore")
def test_snippets(tmp_path, monkeypatch):
    """Those of packages that are not here are left out."""
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_SILENT", "true")
    names: dict = {"__name__": "guide"}
    ran = 0
    for line, mark, code in snippets():
        needed = mark.removeprefix("needs: ").split() if mark.startswith("needs") else []
        if mark == "torchrun" or any(importlib.util.find_spec(name) is None for name in needed):
            continue
        exec(compile("\n" * line + code, str(GUIDE), "exec"), names)
        ran += 1
    assert ran >= 12
    assert (tmp_path / "layers.png").stat().st_size > 1000


def test_snippet_of_several_processes(tmp_path):
    (code,) = (code for _, mark, code in snippets() if mark == "torchrun")
    (tmp_path / "train.py").write_text(code)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "train.py",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    printed = re.findall(r"\[ *nan[^\]]*\]", done.stdout)
    assert len(printed) == 2 and printed[0] == printed[1]


COMMAND = re.compile(
    r"(?:^    |`)(?:torchrun --nproc-per-node 2|python) (benchmarks/\w+\.py|-m oscopt[\w.]+)([^`\n]*)", re.M
)


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "docs/measured/compare.md"]


def test_commands_are_commands():
    """Every command of every page is one that its script understands."""
    seen = set()
    for page in pages():
        for script, rest in COMMAND.findall(page.read_text()):
            seen.add(script)
            if script.startswith("-m"):
                continue  # tests/kernels/test_aot.py starts it
            words = shlex.split(rest.split(" # ")[0].replace(" ...", ""))
            words = [word for word in words if word != "\\"]
            parsed = importlib.import_module(Path(script).stem).parser().parse_args(words)
            assert parsed, (page, script, rest)
    assert {"benchmarks/run.py", "benchmarks/reproduce.py", "benchmarks/kernels.py"} <= seen
