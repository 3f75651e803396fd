"""What a run came to, in a few lines of text."""

from __future__ import annotations

import numpy as np

from .rules import Record, Verdict, decrease_share, phase_signs, turn

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
        if (at := turn(windowed)) is not None:
            means = [float(np.nanmedian(part)) for part in (windowed[:at], windowed[at:])]
            lines.append(
                f"turn          at epoch {at}: median w {means[0]:+.3f} before, {means[1]:+.3f} after"
            )
        lines.append(f"correlation   {sparkline(record.history.global_correlation())}  -1 ▁ to █ +1")
        layers = record.layers
        for name, column in ((record.history.layer_names[0], 0), (record.history.layer_names[-1], -1)):
            values = layers[:, column][np.isfinite(layers[:, column])]
            if len(values):
                text = f"{np.median(values):+.3f} (median), {(values < 0).mean():.0%} of the epochs negative"
                lines.append(f"layer {name:<16} {text}")
    lines += [
        f"{'held    ' if v.held else 'not held'}      {v.claim}: {v.rule}: {v.measured:.3g}" for v in verdicts
    ]
    return lines
