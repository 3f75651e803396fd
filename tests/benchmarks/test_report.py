"""The pages in a headless browser: hover, a phone's width, no network; and figures of long runs."""

from __future__ import annotations

import functools
import re
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from browser import browse, needs_browser
from helpers import append
from study_config import CONFIG

from oscopt import History, OscGD, plot
from oscopt.report import binned
from oscopt.rows import RECORDED
from study import figure, report, rules, summary
from study.experiments import TABLE

pytestmark = pytest.mark.slow


@functools.cache
def wave(epochs: int, layers: int) -> rules.Record:
    """A run whose correlations are waves, different in each layer."""
    t, i = np.arange(epochs)[:, None], np.arange(layers)[None]
    values = np.cos(t / epochs * 6 + i / 7)
    history = History()
    history.add_layers([f"layer{k}.conv" for k in range(layers)])
    for step in range(epochs):
        row = np.ones((len(RECORDED), layers))
        row[0] = values[step] if step else np.nan
        append(history, step, row)
    loss = np.exp(-np.arange(epochs) / epochs * 5)
    sharpness = np.where(np.arange(epochs) % 100 == 0, 19.0, np.nan)
    return rules.Record(history, loss, loss, loss, sharpness, None)


def of_adam(record: rules.Record) -> rules.Record:
    """The same with updates, which are not the gradients' multiples."""
    return replace(record, updates=record.history)


def page_of(record: rules.Record, config=CONFIG) -> str:
    verdicts = rules.judge(("smooth_first", "layers_agree"), record)
    matrices = {5: {"global": np.cos(np.arange(25.0)).reshape(5, 5)}}
    lines = summary.summarise(record, verdicts)
    machine = {"processor": "<unknown> & more"}
    return report.run_page(config, machine, record, matrices, "finished", lines, verdicts)


@needs_browser
def test_values_on_hover(tmp_path):
    record = wave(epochs=90, layers=41)
    script = """
      const canvas = inner.document.querySelector(".heat canvas");
      const told = inner.document.querySelector(".heat output");
      const area = canvas.getBoundingClientRect(), seen = [];
      for (const [epoch, layer] of [[0, 0], [30, 7], [89, 40]]) {
        const clientX = area.left + area.width * (epoch + 0.5) / 90;
        const clientY = area.top + area.height * (layer + 0.5) / 41;
        canvas.dispatchEvent(new inner.PointerEvent("pointermove", { clientX, clientY }));
        seen.push(told.textContent);
      }
      canvas.dispatchEvent(new inner.KeyboardEvent("keydown", { key: "ArrowUp" }));
      seen.push(told.textContent);
      canvas.dispatchEvent(new inner.PointerEvent("pointerleave"));
      return [...seen, told.textContent];
    """
    w = record.layers

    def cell(epoch, layer):
        return f"layer{layer}.conv, epoch {epoch}: {w[epoch, layer]:+.2f}".replace("-", "−")

    expected = ["layer0.conv, epoch 0: unknown", cell(30, 7), cell(89, 40), cell(89, 39), ""]
    assert browse(page_of(record), tmp_path, script, 1000) == str(expected).replace("'", '"').replace(
        ', "', ',"'
    )


@needs_browser
@pytest.mark.parametrize("width", [340, 1200])
def test_nothing_overflows(tmp_path, width):
    """Nor is anything unreadably small: panels stack on a phone."""
    script = """
      const root = inner.document.documentElement;
      const panels = [...inner.document.querySelectorAll(".panels figure")];
      return [root.scrollWidth <= inner.innerWidth, panels.length > 4,
        Math.min(...panels.map((p) => p.getBoundingClientRect().width)) > 280,
        new Set(panels.map((p) => Math.round(p.getBoundingClientRect().left))).size];
    """
    page = page_of(of_adam(wave(60, 41)), replace(CONFIG, optimizer="adam"))
    assert browse(page, tmp_path, script, width) == f"[true,true,true,{1 if width == 340 else 2}]"


def test_pages_need_no_network():
    page = page_of(wave(60, 5))
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//|@import|url\(["']?http""", page)
    assert "&lt;unknown&gt; &amp; more" in page and "<unknown>" not in page


def sketched(record: rules.Record) -> rules.Record:
    """The same with the sketches of another run of that length, whose gradients have a period of 2."""
    p = torch.nn.Parameter(torch.zeros(64))
    base, swing = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    history = History(limit=None, sketches=256)
    optimizer = OscGD([("p", p)], measure="sketch", history=history, backend="torch")
    for epoch in range(len(record.loss)):
        p.grad = base + 3 * (-1) ** epoch * swing
        optimizer.step()
    return replace(record, recurrence=history)


@pytest.mark.parametrize("epochs", [1, 2, 20, 600])
def test_the_whole_run_is_shown(epochs):
    """As a picture of one point an epoch, not as shapes: small, however long the run."""
    record = wave(epochs, 3)
    without, page = page_of(record), page_of(sketched(record))
    assert "The whole run" not in without and "The whole run: every epoch against every other" in page
    assert page.count("data:image/png;base64") > without.count("data:image/png;base64")
    assert len(page) - len(without) < 300_000


def test_oscillation_is_a_checkerboard():
    """Each epoch is one cell, of its own colour."""
    fig, axis = plt.subplots()
    figure.recurrence(axis, sketched(wave(20, 3)), {5: {}, 99: {}})
    cells = axis.images[0].get_array()
    even = np.arange(20) % 2 == 0
    assert (cells[np.ix_(even, even)] > 0.9).all() and (cells[np.ix_(even, ~even)] < -0.5).all()
    plt.close(fig)


def test_long_runs_stay_small():
    """30,000 epochs and 73 layers: every curve and map of them within 6 MB."""
    page = page_of(wave(30_000, 73))
    assert len(page) < 2 << 20


def test_the_page_of_all_rows_stays_small():
    """30,000 epochs and 73 layers in each of them, Adam's beside gradient descent."""
    record = wave(30_000, 73)
    drawn = figure.svg(figure.draw(record, {}, CONFIG))
    heat = report.heat_map(record.layers, record.history.layer_names, "correlation")
    adam = replace(CONFIG, optimizer="adam")
    beside = figure.svg(figure.draw_beside(of_adam(record), adam, record, CONFIG))
    verdicts = [rules.judge(("smooth_first",) * 5, wave(20, 2))] * 3
    outcomes = [
        report.Outcome(
            id, CONFIG, verdicts, [(0, "a", "finished")], drawn, heat, beside if row.beside else None
        )
        for id, row in TABLE.items()
    ]
    page = report.index_page("All", ["notes"], outcomes)
    assert len(page) < 6 << 20 and page.count('<h2 id="') == len(TABLE)


@pytest.mark.parametrize("epochs", [1, 2, 7])
def test_short_runs_are_drawn(epochs):
    assert "</html>" in page_of(wave(epochs, 3))


def test_lines_keep_their_extremes():
    """A spike of one epoch in 30,000 is drawn."""
    record = wave(30_000, 2)
    record.loss[12_345] = 1e6
    drawn = figure.draw(record, {}, CONFIG, "run")
    line = max(
        (line for axis in drawn.axes for line in axis.lines), key=lambda line: np.nanmax(line.get_ydata())
    )
    assert 1e6 in line.get_ydata() and len(line.get_ydata()) <= 1000 and 12_345 in line.get_xdata()


def test_binned():
    values = np.array([[1.0], [3.0], [np.nan], [5.0], [np.nan], [np.nan]])
    np.testing.assert_array_equal(binned(values, 3), [[2.0], [5.0], [np.nan]])
    assert binned(values, 6) is values


def test_the_map_is_readable_in_grey():
    """Each colour is lighter than the one before."""
    red, green, blue, _ = plot.colour_map()(np.linspace(0, 1, 64)).T
    assert (np.diff(0.2126 * red + 0.7152 * green + 0.0722 * blue) > 0).all()


def test_links_can_be_replaced():
    page = page_of(wave(20, 2))
    once = report.link(page, [("all runs", "../report.html")])
    twice = report.link(once, [("all runs", "../report.html")])
    assert once == twice != page and once.count("../report.html") == 1
