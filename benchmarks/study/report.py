"""The page of a run: one file that opens without a network."""

from __future__ import annotations

import html
from typing import Any

from .rules import Verdict

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; display: block; overflow-x: auto; }
td, th { text-align: left; padding: .25rem .8rem .25rem 0; border-bottom: 1px solid #ddd; }
pre { background: #f5f5f5; padding: 1rem; overflow-x: auto; }
svg { width: 100%; height: auto; }
.no { color: #a33; } .yes { color: #276227; }
"""


def page(title: str, lines: list[str], verdicts: list[Verdict], settings: dict[str, Any], svg: str) -> str:
    """HTML with the summary's `lines`, the verdicts, the figure (SVG) and the settings."""
    rows = "".join(
        f"<tr><td>{html.escape(v.claim)}</td><td>{html.escape(v.rule)}</td><td>{v.measured:.3g}</td>"
        f'<td class="{"yes" if v.held else "no"}">{"held" if v.held else "not held"}</td></tr>'
        for v in verdicts
    )
    chosen = "".join(
        f"<tr><td>{html.escape(key)}</td><td>{html.escape(str(value))}</td></tr>"
        for key, value in settings.items()
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>
<h1>{html.escape(title)}</h1>
<pre>{html.escape(chr(10).join(lines))}</pre>
<h2>Claims</h2>
<table><tr><th>claim</th><th>rule</th><th>measured</th><th></th></tr>{rows}</table>
<h2>Figure</h2>
{svg[svg.index("<svg") :]}
<h2>Settings</h2>
<table>{chosen}</table>
</body></html>
"""
