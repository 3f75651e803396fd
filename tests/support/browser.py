"""Pages, opened in a headless browser."""

from __future__ import annotations

import html
import re
import shutil
import subprocess
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")


def browse(page: str, tmp_path: Path, script: str, width: int = 1000, timeout: float = 90) -> str:
    """What `script` returns, as JSON.

    It is JavaScript that sees the page as `inner`, in a frame of `width` pixels, with its errors as
    `inner.errors`.
    """
    harness = tmp_path / "harness.html"
    watched = page.replace(
        "<head>", "<head><script>window.errors = []; onerror = (e) => errors.push(e)</script>", 1
    )
    frame = f'style="width:{width}px;height:800px;border:0" srcdoc="{html.escape(watched)}"'
    harness.write_text(f"""<iframe id="frame" {frame}></iframe><pre id="result"></pre>
    <script>onload = () => {{
      const inner = document.getElementById("frame").contentWindow;
      let result;
      try {{ result = (() => {{ {script} }})(); }} catch (error) {{ result = "threw " + error; }}
      document.getElementById("result").textContent = JSON.stringify(result);
    }};</script>""")
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
         "--virtual-time-budget=5000", "--dump-dom", harness.as_uri()],
        capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip
    found = re.search(r'<pre id="result">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found and found[1], done.stderr[-500:]
    return html.unescape(found[1])
