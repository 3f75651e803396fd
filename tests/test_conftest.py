"""What tests/conftest.py does to skipped tests."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest_plugins = ("pytester",)

TESTS = """
import pytest

@pytest.mark.skipif(True, reason="needs chromium")
def test_marked(): pass

def test_without_a_package():
    pytest.importorskip("no_such_package")

@pytest.mark.xfail(reason="not yet")
def test_expected_to_fail():
    assert False

def test_passes(): pass
"""


@pytest.fixture
def outer(pytester):
    pytester.makeini("[pytest]\nmarkers = gpu: needs a CUDA or ROCm device")
    pytester.makeconftest((Path(__file__).parent / "conftest.py").read_text())
    return pytester


def test_a_skip_fails_with_ci(outer, monkeypatch):
    monkeypatch.setenv("CI", "true")
    outer.makepyfile(TESTS, test_module="import pytest\npytest.importorskip('no_such_module')")
    result = outer.runpytest_inprocess("-q", "--continue-on-collection-errors")
    assert result.parseoutcomes() == {"passed": 1, "failed": 1, "errors": 2, "xfailed": 1}
    result.stdout.fnmatch_lines_random(
        [
            "skipped with CI=true: needs chromium",
            "skipped with CI=true: could not import 'no_such_package'*",
            "skipped with CI=true: could not import 'no_such_module'*",
            "Install what it needs: pip install -e '.[[]test]'*",
        ]
    )


@pytest.mark.parametrize("value", [None, "", "false"])
def test_a_skip_is_a_skip_elsewhere(outer, monkeypatch, value):
    monkeypatch.delenv("CI", raising=False) if value is None else monkeypatch.setenv("CI", value)
    outer.makepyfile(TESTS)
    assert outer.runpytest_inprocess("-q").parseoutcomes() == {"passed": 1, "skipped": 2, "xfailed": 1}


def test_a_missing_gpu_is_no_failure(outer, monkeypatch):
    monkeypatch.setenv("CI", "true")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    outer.makepyfile("import pytest\n@pytest.mark.gpu\ndef test_kernel(): assert False")
    assert outer.runpytest_inprocess("-q").parseoutcomes() == {"skipped": 1}
