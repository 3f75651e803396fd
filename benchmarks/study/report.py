"""The pages: one file each that opens without a network, for a run and for a whole reproduction."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from oscopt.report import escaped as _text
from oscopt.report import heat_map, page

from . import figure
from .config import WINDOW, Config
from .experiments import TABLE
from .rules import RULES, SHORTER, Record, Verdict

_NAV = '<nav id="links">{}</nav>'
_SHORTER = f"same with {100 * SHORTER:.0f} % of the epochs"


def run_page(
    config: Config,
    machine: dict[str, object],
    record: Record,
    matrices: figure.Matrices,
    state: str,
    lines: Sequence[str],
    verdicts: Sequence[Verdict],
    beside: str | None = None,
) -> str:
    """The page of one run; `beside` is an SVG of :func:`study.figure.draw_beside`."""
    row = TABLE[config.experiment]
    parts = [
        _NAV.format(""),
        f"<h1>{_text(config.name)}</h1>",
        f"<p>{_text(row.title)} of the paper ({_text(row.id)}), preset {_text(config.preset)}, "
        f"seed {config.seed}. The run {_STATES[state]} after {len(record.loss)} epochs.</p>",
        "<h2>Claims</h2>",
        claims_table(verdicts),
        f"<h2>In short</h2><pre>{_text(chr(10).join(lines))}</pre>",
        "<h2>Figures</h2>",
        _panels(figure.panels(record, matrices, config)),
        _panels(figure.whole_run_panels(record, matrices)),
        "<h2>Every layer, every epoch</h2>",
        heat_map(record.layers, record.history.layer_names, "correlation of adjacent gradients"),
    ]  # fmt: skip
    if record.updates is not None:
        values = record.updates.correlation(window=WINDOW)
        parts.append("<h3>Updates</h3>")
        parts.append(heat_map(values, record.updates.layer_names, "correlation of adjacent updates"))
    if beside is not None:
        parts.append(f'<h2>Beside gradient descent</h2><div class="scroll">{beside}</div>')
    parts.append(_details("Settings", config.to_dict()) + _details("Machine and versions", machine))
    return page(config.name, parts)


_STATES = {"finished": "finished", "interrupted": "was interrupted", "diverged": "diverged"}


@dataclass(frozen=True)
class Outcome:
    """One row of the table and what its runs gave.

    Attributes:
        verdicts: of each seed, in the order of the row's claims; empty where a run failed.
        runs: (seed, link to the run's page, how it ended or what went wrong).
        figure, heat: SVG of the row's figure and heat map of its first run; None: nothing was recorded.
    """

    id: str
    settings: Config
    verdicts: Sequence[Sequence[Verdict]]
    runs: Sequence[tuple[int, str, str]]
    figure: str | None = None
    heat: str | None = None
    beside: str | None = None


def index_page(title: str, notes: Iterable[str], outcomes: Sequence[Outcome]) -> str:
    """The page of a whole reproduction."""
    parts = [f"<h1>{_text(title)}</h1>", *(f'<p class="note">{_text(note)}</p>' for note in notes)]
    parts.append('<h2>Claims</h2><div class="scroll"><table class="claims">')
    parts.append(
        "<tr><th>experiment</th><th>claim</th><th>rule</th><th>measured, by seed</th><th>held</th>"
        f"<th>{_SHORTER}</th></tr>"
    )
    for outcome in outcomes:
        for i, verdict in enumerate(outcome.verdicts[0] if outcome.verdicts else ()):
            of_seeds = [verdicts[i] for verdicts in outcome.verdicts]
            held = sum(v.held for v in of_seeds)
            kind = "yes" if held == len(of_seeds) else "some" if held else "no"
            measured = ", ".join(number(v.measured) for v in of_seeds)
            parts.append(
                f'<tr><td><a href="#{outcome.id}">{outcome.id}</a></td>'
                f"<td>{verdict.claim}<small>{_text(RULES[verdict.claim].says)}</small></td>"
                f'<td>{_text(verdict.rule)}</td><td class="number" data-label="measured">{measured}</td>'
                f'<td class="{kind} number">{held} of {len(of_seeds)}</td>'
                f'<td class="number" data-label="{_SHORTER}:">'
                f"{sum(v.settled for v in of_seeds)} of {len(of_seeds)}</td></tr>"
            )
    parts.append("</table></div>")
    for outcome in outcomes:
        row, config = TABLE[outcome.id], outcome.settings
        parts.append(f'<h2 id="{outcome.id}">{_text(row.title)}: {_text(config.name)} ({outcome.id})</h2>')
        size = f"{config.n_train or 'all'} pictures, {config.epochs} epochs"
        width = "" if config.model == "linear" else f", width {config.width}"
        parts.append(f"<p>{size}{width}, micro-batch {config.micro_batch}. Runs: ")
        parts.append(", ".join(_run_link(*run) for run in outcome.runs) + "</p>")
        for svg in (outcome.figure, outcome.beside):
            if svg is not None:
                parts.append(f'<div class="scroll">{svg}</div>')
        if outcome.heat is not None:
            parts.append(outcome.heat)
    return page(title, parts)


def _run_link(seed: int, address: str, state: str) -> str:
    name = f'<a href="{_text(address)}">seed {seed}</a>' if address else f"seed {seed}"
    return f"{name} ({_text(state)})"


def link(whole: str, links: Sequence[tuple[str, str]]) -> str:
    """The page `whole` of a run with these links (text, address) at its top, in place of those it had."""
    anchors = "".join(f'<a href="{_text(address)}">{_text(text)}</a>' for text, address in links)
    return re.sub(_NAV.format(".*?"), lambda _: _NAV.format(anchors), whole, count=1, flags=re.DOTALL)


def claims_table(verdicts: Sequence[Verdict]) -> str:
    """Claims with the paper's words, rule, measured value, held or not, and so with fewer epochs or not."""
    rows = "".join(
        f"<tr><td>{v.claim}<small>{_text(RULES[v.claim].says)}</small></td><td>{_text(v.rule)}</td>"
        f'<td class="number" data-label="measured">{number(v.measured)}</td>'
        f'<td class="{"yes" if v.held else "no"} number">{"held" if v.held else "not held"}'
        f"{f'<small>{_text(v.why)}</small>' if v.why else ''}</td>"
        f'<td class="number" data-label="{_SHORTER}:">{"yes" if v.settled else "no"}</td></tr>'
        for v in verdicts
    )
    header = f"<tr><th>claim</th><th>rule</th><th>measured</th><th></th><th>{_SHORTER}</th></tr>"
    return f'<div class="scroll"><table class="claims">{header}{rows}</table></div>'


def number(value: float) -> str:
    """Three digits, or a word where there is none."""
    return f"{value:.3g}" if math.isfinite(value) else "unknown"


def _panels(drawn: Iterable[tuple[str, str]]) -> str:
    figures = (f"<figure><figcaption>{_text(text)}</figcaption>{svg}</figure>" for text, svg in drawn)
    return f'<div class="panels">{"".join(figures)}</div>'


def _details(title: str, values: dict[str, object]) -> str:
    rows = "".join(f"<tr><td>{_text(key)}</td><td>{_text(value)}</td></tr>" for key, value in values.items())
    return f'<details><summary>{title}</summary><div class="scroll"><table>{rows}</table></div></details>'
