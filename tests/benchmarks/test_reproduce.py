"""benchmarks/reproduce.py as users run it; the runs are shortened."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import reproduce

pytestmark = pytest.mark.slow

REPRODUCE = Path(reproduce.__file__)


@pytest.fixture
def call(capsys):
    """reproduce.py in this process; its runs are processes of their own."""

    def here(*arguments: object):
        capsys.readouterr()
        try:
            code = reproduce.main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return here


def test_from_nothing_to_the_table_and_again(tmp_path, call):
    out, results = tmp_path / "all", tmp_path / "results.md"
    results.write_text("# Results\n\n<!-- results: begin -->\nold\n<!-- results: end -->\n\nMore.\n")
    options = (
        "--only",
        "fig1,fig6,adam-cnn",
        "--preset",
        "small",
        "--epochs",
        12,
        "--jobs",
        2,
        "--threads",
        1,
        "--seeds",
        0,
    )
    code, stdout, stderr = call(*options, "--out", out, "--markdown", results)
    assert code == 0, (stdout, stderr)
    # fig6 shows the layers of fig2's run, which adam-cnn is compared with as well.
    assert "3 experiments are 3 runs; 0 finished before" in stdout
    assert sorted(p.name for p in out.glob("*-seed0")) == ["adam-cnn-seed0", "fig1-seed0", "fig2-seed0"]
    told = {e["id"]: e for e in json.loads((out / "results.json").read_text())["experiments"]}
    assert list(told) == ["fig1", "fig6", "adam-cnn"]
    (fig1,), (adam,) = told["fig1"]["claims"], told["adam-cnn"]["claims"]
    assert fig1[0]["claim"] == "correlated_throughout" and fig1[0]["held"] and fig1[0]["measured"] > 0.9
    assert [c["claim"] for c in adam] == ["suppressed", "suppressed_beside_gd"]
    for table in (stdout, results.read_text()):
        assert re.search(r"fig1 .*correlated_throughout.*smallest w >= 0.9.*(yes|1 of 1)", table), table
    text = results.read_text()
    assert text.startswith("# Results") and text.endswith("\n\nMore.\n") and "old" not in text
    page = (out / "report.html").read_text()
    assert 'href="fig2-seed0/report.html"' in page and "GD: gradients" in page and len(page) < 6 << 20
    run_page = (out / "fig2-seed0" / "report.html").read_text()
    assert '<nav id="links"><a href="../report.html">all runs</a></nav>' in run_page

    written = (out / "fig1-seed0" / "checkpoint.pt").stat().st_mtime_ns
    (out / "fig2-seed0" / "verdict.json").unlink()  # as if it had been killed
    code, stdout, stderr = call(*options, "--out", out)
    assert code == 0 and "2 finished before" in stdout and "fig2 seed 0: done" in stdout, (stdout, stderr)
    assert (out / "fig1-seed0" / "checkpoint.pt").stat().st_mtime_ns == written

    code, _, stderr = call(*options[:4], "--epochs", 13, "--out", out)
    assert code == 2 and "fig1-seed0 holds another run: epochs (12, now 13)" in stderr
    assert len(stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_and_resumed(tmp_path, number, code):
    out = tmp_path / "all"
    options = [
        "--only",
        "fig1,fig2",
        "--preset",
        "small",
        "--epochs",
        "100000",
        "--jobs",
        "2",
        "--out",
        str(out),
    ]
    command = [sys.executable, str(REPRODUCE), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    logs = [out / "logs" / f"fig{i}-seed0.log" for i in (1, 2)]
    deadline = time.monotonic() + 150
    while (
        not all(log.exists() and "epoch " in log.read_text() for log in logs) and time.monotonic() < deadline
    ):
        time.sleep(0.1)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == code, (stdout, stderr)
    assert (
        "interrupted; go on with: python" in stderr and f"--out {out}" in stderr and "Traceback" not in stderr
    )
    for name in ("fig1", "fig2"):
        assert json.loads((out / f"{name}-seed0" / "verdict.json").read_text())["state"] == "interrupted"
    told = json.loads((out / "results.json").read_text())["experiments"]
    assert [run[2] for e in told for run in e["runs"]] == ["interrupted", "interrupted"]
    assert not any(e["claims"] for e in told)  # not judged before they are finished


def test_a_run_that_fails(tmp_path, call):
    """The others are made all the same; the reason is told in one line."""
    out = tmp_path / "all"
    options = ("--only", "fig1,fig2", "--preset", "small", "--epochs", 12, "--threads", 1, "--out", out)
    (out / "fig2-seed0").mkdir(parents=True)
    (out / "fig2-seed0" / ".lock").mkdir()
    code, stdout, stderr = call(*options)
    assert code == 2 and "fig1 seed 0: done" in stdout, (stdout, stderr)
    assert re.fullmatch(r"error: fig2 seed 0 failed: error: .*fig2-seed0: Is a directory.*\n", stderr), stderr


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["--only", "fig1,fig99"], "unknown experiment 'fig99'; there are fig1"),
        (["--jobs", "0"], "--jobs: '0' is not a whole number greater than 0"),
        (["--jobs", "two"], "--jobs: 'two' is not a whole number"),
        (["--seeds", "0,x"], "--seeds: 'x' is not a whole number from 0 on"),
        (["--seeds", "1.5"], "'1.5' is not a whole number"),
        (["--seeds", "-1"], "--seeds"),
        (["--preset", "huge"], "huge"),
        (["--out", "/proc/nowhere"], "--out /proc/nowhere"),
    ],
)
def test_bad_input(tmp_path, call, monkeypatch, arguments, text):
    monkeypatch.chdir(tmp_path)
    code, stdout, stderr = call(*arguments)
    assert code == 2 and text in stderr and len(stderr.strip().splitlines()) == 1, (stdout, stderr)
    assert stderr.startswith("error: ") and not os.listdir(tmp_path)
