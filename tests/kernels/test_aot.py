"""The Triton kernels compiled ahead of time, for GPUs that are not here."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys

import pytest
import triton

from oscopt.kernels.aot import TARGETS, VARIANTS, main

pytestmark = pytest.mark.slow


OLDEST_TRITON = triton.__version__.startswith("3.6.")
ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
COMMAND = (sys.executable, "-m", "oscopt.kernels.aot")


def aot(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, env=ENVIRONMENT, timeout=280
    )


@pytest.fixture(scope="module", params=TARGETS)
def reports(request) -> list[dict]:
    """All variants for float32 and bfloat16, one target."""
    done = aot("--json", "--target", request.param, "--dtype", "float32", "bfloat16")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_variant_is_there(reports):
    kinds = {(r["dtype"], r["variant"]) for r in reports}
    assert len({r["target"] for r in reports}) == 1 and len(kinds) == 2 * (len(VARIANTS) + 1) + 1


def test_targets():
    assert TARGETS == ("cuda:80", "cuda:90", "cuda:100", "hip:gfx942")


def test_every_step_that_can_be_taken_is_a_variant():
    """Measured or not, with and without momentum, copies, scales and bounds: what the backend may launch."""
    for pair, align, update, momentum, copy, scaled, bounded in itertools.product((False, True), repeat=7):
        possible = (update or not (momentum or scaled or align)) and (pair or not copy)
        possible &= momentum and scaled or not bounded
        if (pair or update) and possible and (momentum and not pair or not align):
            name = "align" if align else "monitor" if not update else "measure" if pair else "update"
            parts = {"momentum": momentum, "copy": copy, "scaled": scaled, "bounded": bounded}
            assert "+".join([name, *(part for part, on in parts.items() if on)]) in VARIANTS


def test_no_spills(reports):
    for r in reports:
        # For sm_100, ptxas puts one pointer that the loop does not need on the stack; Triton 3.6 one more.
        some = ("sketch+momentum", *(["align+momentum+scaled+bounded"] if OLDEST_TRITON else []))
        needless = r["target"] == "cuda:100" and r["variant"].startswith(some)
        assert max(r["spills"], r["stack_bytes"]) <= 8 * needless, r


def test_main_path_is_128_bits_wide(reports):
    """Each array is read once: parameter, gradient, previous gradient, buffer; and nothing narrower is."""
    for r in reports:
        if r["dtype"] == "float64" or r["variant"] == "chunk":  # the small kernels that add up tiles
            continue
        parts = r["variant"].split("+")
        again = set()
        if parts[0] == "sketch":  # reads the gradient once more, rotated, and stores sums beside its buckets
            again = {"load 32" if r["dtype"] == "float32" else "load 16", "store 64"}
        assert set(r["main"]) - again <= {"load 128", "store 128"}, r
        arrays = {"measure": 3, "align": 2, "update": 2, "monitor": 2, "sketch": 2}[parts[0]]
        arrays += ("momentum" in parts) - (parts[0] == "sketch" and "monitor" in parts)
        assert r["main"]["load 128"] % arrays == 0 or parts[0] == "update", r
        if r["variant"] != "sketch+monitor":  # stores its buckets, whatever the width
            assert ("store 128" in r["main"]) == (r["variant"] != "monitor"), r


def test_masked_path_is_one_element_wide(reports):
    for r in reports:
        if r["dtype"] != "float64" and r["variant"] != "chunk" and r["target"].startswith("cuda"):
            bits = {"float32": 32, "bfloat16": 16}[r["dtype"]]
            assert {int(key.split()[1]) for key in r["masked"]} == {bits}, r


def test_table_for_people():
    done = aot("--target", "cuda:90", "--dtype", "float32", "--variant", "measure")
    header, row = done.stdout.splitlines()
    assert header.split()[:4] == ["target", "dtype", "variant", "regs"]
    assert row.startswith("cuda:90     float32   measure") and "3 load 128, 1 store 128" in row


@pytest.mark.parametrize(
    ("end", "code", "line"),
    [
        (signal.SIGINT, 130, "interrupted"),
        (signal.SIGTERM, 143, "interrupted"),
        (None, 2, "error: the output cannot be read or written (Broken pipe)"),
    ],
)
def test_an_early_end(tmp_path, end, code, line):
    """By a signal, or as nobody reads on: one line, and no traceback."""
    process = subprocess.Popen(
        COMMAND,
        env=ENVIRONMENT | {"TRITON_CACHE_DIR": str(tmp_path)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline().startswith("target")
    if end is None:
        process.stdout.close()
    else:
        process.send_signal(end)
    assert process.stderr.read() == line + "\n"
    assert process.wait() == code
    process.stderr.close()


@pytest.mark.parametrize("target", ["nonsense", "cuda:"])
def test_no_target(target, capsys):
    assert main(["--target", target]) == 2
    out, error = capsys.readouterr()
    assert out == "" and len(error.strip().splitlines()) == 1 and repr(target) in error


@pytest.mark.parametrize("target", ["cuda:12", "hip:gfx0000"])
def test_target_that_the_compiler_does_not_know(target):
    done = aot("--target", target)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1 and repr(target) in done.stderr
