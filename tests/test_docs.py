"""The snippets of docs/guide.md, run from top to bottom; the commands and links of all pages."""

from __future__ import annotations

import importlib
import importlib.util
import re
import shlex
import shutil
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


# ---- commands --------------------------------------------------------------------------------------------

COMMAND = re.compile(
    r"(?:^    |`)(?:\w+=\S+ )?(?:taskset -c 1 |torchrun --nproc-per-node 2 )?(?:python )?"
    r"(?:benchmarks/(\w+\.py)|(-m oscopt[\w.]+))((?: [^`\n#]*)?)",
    re.M,
)
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

SMALLEST = {
    "run.py": "... --dataset mnist5k --n-train 32 --micro-batch 32 --width 4 --epochs 1 --threads 1",
    "compare.py": "--contenders gd ... --only small --seeds 0",
    "sketch.py": "... --models cnn --seeds 1 --steps 2",
    "kernels.py": "--contenders 'oscgd numba' ... --sets --sizes 1e3 --seconds 0.01 --threads 1 --device cpu",
}
"""What stands before and behind the options that a page gives, so that a command takes seconds here."""

REPRODUCED = "benchmarks/test_reproduce.py::test_from_nothing_to_the_table_and_again"
ELSEWHERE = {
    "-m oscopt.kernels.aot": "kernels/test_aot.py::test_table_for_people",
    "reproduce.py --seeds 0,1,2 --jobs 2": REPRODUCED,
    "reproduce.py --preset small --seeds 0,1,2 --jobs 2 --threads 1 --markdown docs/results.md": REPRODUCED,
    "reproduce.py --preset paper --estimate": "benchmarks/test_estimate.py::"
    "test_the_command_tells_all_runs_in_order_and_writes_nothing",
    "run.py ...": "benchmarks/test_parallel.py::test_two_processes",
    "run.py --resume --out FOLDER": "benchmarks/test_run.py::test_folders_that_hold_a_run",
    "device_time.py --sets resnet34 gpt2": "benchmarks/test_commands.py::test_device_time",
    "throughput.py --models MODEL --threads 2": "benchmarks/test_commands.py::test_throughput",
}
"""The tests that start those which are not started here, with the same options."""


def commands() -> list[str]:
    """Of all pages, each once; those without options only where no other one has the script."""
    found = [
        f"{script or module}{rest}".strip()
        for page in PAGES
        for script, module, rest in COMMAND.findall(page.read_text())
    ]
    named = {command.split()[0] for command in found if " " in command}
    return sorted({c for c in found if " " in c or c not in named})


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where a reader stands, with the folders that the pages speak of; pictures are left out."""
    import matplotlib.pyplot as plt

    from race import tasks
    from study import figure

    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    for name in ("data", "DIR"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(figure, "panels", lambda *_: ())
    monkeypatch.setattr(figure, "draw_beyond", lambda *_: plt.figure())
    task = tasks.Task("small", 30, 1.0, tasks._quadratic(20.0))
    monkeypatch.setattr(tasks, "tasks", lambda *_: {"small": task, "quadratic-1e2": task})


@pytest.mark.parametrize("command", [c for c in commands() if c not in ELSEWHERE])
def test_commands_are_started(folder, capsys, command):
    """Every number on a page has a command there that prints it: it runs, at its smallest."""
    script, *words = shlex.split(command)
    if "--markdown docs/measured" not in command:
        tables = {"--lm", "--generalize", "--limits"} & set(words)
        smallest = "... --quick --seeds 0" if tables else SMALLEST[script]
        before, behind = map(shlex.split, smallest.split("..."))
        words = before + words + behind
    assert importlib.import_module(script.removesuffix(".py")).main(words) == 0, capsys.readouterr().err
    assert re.search(r"\d", capsys.readouterr().out)


def test_other_commands_are_started_elsewhere():
    assert set(ELSEWHERE) <= set(commands())
    for command, test in ELSEWHERE.items():
        path, name = test.split("::")
        (text,) = re.findall(rf"^def {name}\(.*?(?=^\S|\Z)", (ROOT / "tests" / path).read_text(), re.M | re.S)
        for option in re.findall(r"--[\w-]+", command):
            assert f'"{option}"' in text, (test, option)


def test_all_scripts_have_a_command_on_a_page():
    scripts = {command.split()[0] for command in commands()}
    assert scripts == {"-m", "device_time.py", "throughput.py", "reproduce.py", *SMALLEST}


# ---- links -----------------------------------------------------------------------------------------------

LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)")


def anchors(page: Path) -> set[str]:
    """Of its headings, as the sites that show Markdown make them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_links():
    """Each leads to a file of the repository, and to a heading where it says so."""
    count = 0
    for page in (*PAGES, ROOT / "CONTRIBUTING.md"):
        for target, heading in LINK.findall(page.read_text()):
            if not target.startswith("https://"):
                linked = (page.parent / target) if target else page
                assert linked.exists(), (page.name, target)
                assert not heading or heading in anchors(linked), (page.name, target, heading)
                count += 1
    assert count > 30


def test_what_was_measured():
    """Data and pictures only, each linked from a page."""
    linked = {
        (page.parent / target).resolve() for page in PAGES for target, _ in LINK.findall(page.read_text())
    }
    for path in (ROOT / "docs" / "measured").iterdir():
        assert path.suffix in (".csv", ".png") and path in linked, path.name
