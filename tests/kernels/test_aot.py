"""The Triton kernels compiled ahead of time, for GPUs that are not here."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys

import pytest

from oscopt.kernels.aot import TARGETS, VARIANTS

pytestmark = pytest.mark.slow


def aot(*arguments: str) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "oscopt.kernels.aot", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)


@pytest.fixture(scope="module", params=TARGETS)
def reports(request) -> list[dict]:
    """All variants for float32 and bfloat16, one target."""
    done = aot("--json", "--target", request.param, "--dtype", "float32", "bfloat16")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_variant_is_there(reports):
    kinds = {(r["dtype"], r["variant"]) for r in reports}
    assert len({r["target"] for r in reports}) == 1 and len(kinds) == 2 * len(VARIANTS) + 1


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
        assert (r["spills"], r["stack_bytes"]) == (0, 0), r


def test_main_path_is_128_bits_wide(reports):
    """Each array is read once: parameter, gradient, previous gradient, buffer; and nothing narrower is."""
    for r in reports:
        if r["dtype"] == "float64":  # the small kernel that adds up tiles
            continue
        assert set(r["main"]) <= {"load 128", "store 128"}, r
        parts = r["variant"].split("+")
        arrays = {"measure": 3, "align": 2, "update": 2, "monitor": 2}[parts[0]] + ("momentum" in parts)
        assert r["main"]["load 128"] % arrays == 0 or parts[0] == "update", r
        assert ("store 128" in r["main"]) == (r["variant"] != "monitor"), r


def test_masked_path_is_one_element_wide(reports):
    for r in reports:
        if r["dtype"] != "float64" and r["target"].startswith("cuda"):
            bits = {"float32": 32, "bfloat16": 16}[r["dtype"]]
            assert {int(key.split()[1]) for key in r["masked"]} == {bits}, r


def test_table_for_people():
    done = aot("--target", "cuda:90", "--dtype", "float32", "--variant", "measure")
    header, row = done.stdout.splitlines()
    assert header.split()[:4] == ["target", "dtype", "variant", "regs"]
    assert row.startswith("cuda:90     float32   measure") and "3 load 128, 1 store 128" in row


@pytest.mark.parametrize("target", ["nonsense", "cuda:", "cuda:12", "hip:gfx0000"])
def test_unknown_target(target):
    done = aot("--target", target)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1 and repr(target) in done.stderr
