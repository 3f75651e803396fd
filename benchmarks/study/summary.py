"""What a run came to, in a few lines of text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .rules import Record, Stretch, Verdict, decrease_share, phase_signs, stretches

_BARS = "▁▂▃▄▅▆▇█"


def sparkline(values: np.ndarray, width: int = 60) -> str:
    """`values` in [-1, 1] as a line of at most `width` bars, blank where nothing is known."""
    parts = np.array_split(values, min(width, len(values))) if len(values) else []
    bars = []
    for part in parts:
        known = part[np.isfinite(part)]
        level = (
            None if not len(known) else int((np.clip(known.mean(), -1, 1) + 1) / 2 * (len(_BARS) - 1) + 0.5)
        )
        bars.append(" " if level is None else _BARS[level])
    return "".join(bars)


def summarise(record: Record, verdicts: list[Verdict]) -> list[str]:
    """The lines that run.py ends with."""
    windowed = record.windowed
    known = windowed[np.isfinite(windowed)]
    lines = [
        f"loss          {record.loss[0]:.4g} -> {record.loss[-1]:.4g}, accuracy {record.accuracy[-1]:.1%}"
    ]
    if len(known):
        share = decrease_share(record.loss, phase_signs(windowed))
        of_decrease = (
            f"{share:.0%} of the loss decrease in negative phases" if share == share else "no decrease"
        )
        lines.append(f"negative      {(known < 0).mean():.0%} of the epochs (windowed mean), {of_decrease}")
        if found := stretches(windowed):
            lines.append(f"stretches     {_in_words(found, windowed)}")
        lines.append(f"correlation   {sparkline(record.history.global_correlation())}  -1 ▁ to █ +1")
        layers = record.layers
        for name, column in ((record.history.layer_names[0], 0), (record.history.layer_names[-1], -1)):
            values = layers[:, column][np.isfinite(layers[:, column])]
            if len(values):
                text = f"{np.median(values):+.3f} (median), {(values < 0).mean():.0%} of the epochs negative"
                lines.append(f"layer {name:<16} {text}")
    return lines + [_line(verdict) for verdict in verdicts]


def _line(v: Verdict) -> str:
    found = "held    " if v.held else "not held"
    remarks = [v.why] if v.why else []
    remarks += [] if v.settled else ["otherwise with the first 80 % of the epochs"]
    told = f" ({'; '.join(remarks)})" if remarks else ""
    return f"{found}      {v.claim}: {v.rule}: {v.measured:.3g}{told}"


def _in_words(found: Sequence[Stretch], windowed: np.ndarray) -> str:
    """Up to five, with the median w of each."""
    told = [
        f"{'smooth' if stretch.sign > 0 else 'oscillating'} to epoch {stretch.stop} "
        f"({stretch.median(windowed):+.3f})"
        for stretch in found
    ]
    if len(told) > 5:
        told[3:-1] = [f"{len(told) - 4} more"]
    return ", ".join(told)
