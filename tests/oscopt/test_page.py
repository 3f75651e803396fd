"""The page of any record: in a headless browser, light and dark, on a phone; long runs and many layers."""

from __future__ import annotations

import functools
import re
import subprocess
import sys
from pathlib import Path

import browser
import numpy as np
import pytest
import torch
from browser import needs_browser
from torch import nn

from oscopt import History, OscGD, OscMonitor
from oscopt.__main__ import main
from oscopt.report import binned, record_page
from oscopt.rows import Rows

pytest.importorskip("matplotlib")

browse = functools.partial(browser.browse, timeout=200)
EXAMPLES = Path(__file__).parents[2] / "examples"


def waves(steps: int, layers: int) -> History:
    """A record whose correlations are waves, different in each layer."""
    t, i = np.arange(steps)[:, None], np.arange(layers)[None]
    rows = np.ones((steps, 9, layers))
    rows[:, 0] = np.cos(t / steps * 6 + i / 7)
    rows[0, 0] = np.nan
    rows[:, 4:6] = np.nan  # no momentum
    history = History(limit=None)
    history.add_layers([f"model.encoder.layers.block{k}.<conv>" for k in range(layers)])
    history.extend(Rows(t[:, 0], rows, np.full((steps, 2, layers), 0.1)))
    return history


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))


def train(model: nn.Module, optimizer, steps: int = 40) -> None:
    x = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), (x[:, 0] > 0).long()).backward()
        optimizer.step()


@needs_browser
@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1400])
def test_in_a_browser(tmp_path, width):
    """No errors, nothing wider than the window, panels and names that can be read, values on hover."""
    history = waves(90, 41)
    script = """
      const texts = (selector) => [...inner.document.querySelectorAll(selector)].map((e) => e.textContent);
      const root = inner.document.documentElement;
      const panels = [...inner.document.querySelectorAll(".panels figure")];
      const canvas = inner.document.querySelector(".heat canvas");
      const area = canvas.getBoundingClientRect();
      const clientX = area.left + area.width * 30.5 / 90, clientY = area.top + area.height * 7.5 / 41;
      canvas.dispatchEvent(new inner.PointerEvent("pointermove", { clientX, clientY }));
      return [inner.errors.length, root.scrollWidth <= inner.innerWidth,
        Math.min(...panels.map((p) => p.getBoundingClientRect().width)) > 280,
        inner.document.querySelectorAll("table.layers tr").length,
        inner.document.querySelector(".rows").offsetWidth > 0,
        texts(".rows span").slice(0, 2), texts(".ticks span"),
        inner.document.querySelector(".heat output").textContent];
    """
    value = f"{history.correlation(5)[30, 7]:+.2f}".replace("-", "−")
    names = '["…encoder.layers.block0.<conv>","…encoder.layers.block2.<conv>"]'  # of every second row
    shown = str(width == 1400).lower()
    ticks = '["0","22","44","66","89"]'
    expected = (
        f'[0,true,true,43,{shown},{names},{ticks},"model.encoder.layers.block7.<conv>, step 30: {value}"]'
    )
    assert browse(record_page([history]), tmp_path, script, width) == expected


@pytest.mark.slow
def test_what_is_on_it(tmp_path):
    """Each part is there where it follows from the record, and only there; nothing comes from a network."""
    model, adapted, momentum = net(), net(), net()
    plain = OscGD(
        model.named_parameters(),
        lr=0.1,
        measure="sketch",
        history=History(sketches=16),
        backend="torch",
    )
    auto = OscGD(adapted.named_parameters(), adapt="auto", backend="torch")
    adam = torch.optim.AdamW(momentum.parameters())
    monitor = OscMonitor(adam, momentum.named_parameters(), what=("grad", "update"), backend="torch")
    for trained, optimizer in ((model, plain), (adapted, auto), (momentum, adam)):
        train(trained, optimizer)
    plain.history.report(tmp_path / "plain.html", title="Mine & <yours>")
    auto.history.report(tmp_path / "auto.html")
    monitor.report(tmp_path / "adam.html")
    pages = {name: (tmp_path / f"{name}.html").read_text() for name in ("plain", "auto", "adam")}
    parts = ("the edge of stability<", "Step sizes of the layers", "Alignment with", "Any two steps")
    found = {name: [part in page for part in parts] for name, page in pages.items()}
    assert found == {
        "plain": [True, False, False, True],
        "auto": [False, True, True, False],
        "adam": [False, False, False, False],
    }
    assert "Mine &amp; &lt;yours&gt;" in pages["plain"] and "<yours>" not in pages["plain"]
    assert "AdamW&#x27;s updates" in pages["adam"] and pages["adam"].count("<canvas") == 2
    for page in pages.values():
        assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//|@import|url\(["']?http""", page)


def test_curvature_between_mini_batches_is_called_noise():
    model, notes = net(), []
    for batches in (1, 8):
        optimizer = OscGD(model.named_parameters(), lr=1e-3, backend="torch")
        for step in range(60):
            x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step % batches))
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), x[:, :2].sign()).backward()
            optimizer.step()
        notes.append("mostly noise" in record_page([optimizer.history]))
    assert notes == [False, True]


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "layers"), [(30_000, 20), (40, 6000), (1, 1), (2, 3)])
def test_sizes(steps, layers):
    page = record_page([waves(steps, layers)])
    assert "</html>" in page and len(page.encode()) < 6 << 20


def test_binned():
    values = np.array([[1.0], [3.0], [np.nan], [5.0], [np.nan], [np.nan]])
    np.testing.assert_array_equal(binned(values, 3), [[2.0], [5.0], [np.nan]])
    assert binned(values, 6) is values
    thinned = binned(values, 4, np.array([0, 10, 20, 37, 38, 39]))  # a stretch is 10 steps long
    np.testing.assert_array_equal(thinned, [[1.0], [3.0], [np.nan], [5.0]])
    gap = binned(values[:4], 3, np.array([0, 1, 2, 29]))
    np.testing.assert_array_equal(gap, [[2.0], [np.nan], [5.0]])
    np.testing.assert_array_equal(binned(values, 9, np.arange(0, 60, 10)), values)


def test_reading_changes_nothing():
    history = waves(50, 3)
    before = history.to_numpy()
    record_page([history])
    np.testing.assert_equal(history.to_numpy(), before)


def test_an_empty_record_has_no_page(tmp_path):
    with pytest.raises(ValueError, match="holds no steps"):
        History().report(tmp_path / "page.html")
    assert not list(tmp_path.iterdir())


def test_without_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        waves(5, 2).report(tmp_path / "page.html")


def test_command(tmp_path, capsys):
    """Of a file, of a folder of steps, of a run's folder; errors in one line."""
    history = waves(30, 2)
    (tmp_path / "run").mkdir()
    history.save(tmp_path / "run" / "history.npz")
    history.save(tmp_path / "run" / "updates.npz")
    history.stream_to(tmp_path / "steps")
    for path, maps in (("run", 2), ("run/history.npz", 1), ("steps", 1)):
        out = tmp_path / "page.html"
        assert main(["report", str(tmp_path / path), str(out)]) == 0
        assert out.read_text().count("<canvas") == maps
        out.unlink()
    assert main(["summary", str(tmp_path / "steps"), "--last", "25"]) == 0
    assert "steps 5 to 29" in capsys.readouterr().out
    assert main(["report", str(tmp_path / "none")]) == 2
    assert "none" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("report h.npz .", ".: it is a folder; give the name of a file"),
        ("report h.npz folder", "folder: it is a folder; give the name of a file"),
        (
            "report h.npz none/page.html",
            "none/page.html: its folder is not there; create it, or give another one",
        ),
        ("report h.npz h.npz/page.html", "h.npz/page.html: h.npz is no folder; give another one"),
        ("report h.npz h.npz", "'h.npz' is the record itself; give another file for the page"),
        ("report none", "none: there is no such record; give a file or folder"),
        ("report empty.npz", "the history holds no steps yet; there is nothing to show"),
        ("summary folder", "'folder' is no history: it holds no files of steps"),
        ("summary other.npz", "'other.npz' is no history: it lacks 'format'"),
        ("summary odd.npz", "'odd.npz' is no history, or a damaged one: "),
        ("summary text", "'text' is no history, or a damaged one: "),
        ("summary h.npz --last 0", "Invalid last: 0; use a number of steps, 1 or more"),
    ],
)
def test_errors_of_the_command(tmp_path, monkeypatch, capsys, arguments, said):
    """One line with the value and the remedy; nothing is left behind."""
    monkeypatch.chdir(tmp_path)
    waves(30, 2).save("h.npz")
    History().save("empty.npz")
    np.savez("other.npz", a=np.zeros(3))
    np.savez("odd.npz", format=np.ones(2), steps=np.zeros(3), layer_names=np.zeros(3))
    Path("text").write_text("text")
    Path("folder").mkdir()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert main(arguments.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"oscopt: {said}")
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "few"),
    [
        ("full_batch", ["--steps", "40"]),
        ("monitor_adamw", ["--epochs", "2"]),
        ("adaptation", ["--steps", "40"]),
        ("hugging_face", ["--steps", "25"]),
        ("lightning_module", ["--epochs", "2"]),
    ],
)
def test_examples(name, few, tmp_path):
    if name in ("hugging_face", "lightning_module"):
        pytest.importorskip("transformers" if name == "hugging_face" else "lightning")
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *few, "--out", str(tmp_path / "page.html")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    assert "</html>" in (tmp_path / "page.html").read_text()
