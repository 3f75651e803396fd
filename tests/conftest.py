"""Set up before anything is imported: without a GPU, Triton kernels run by its interpreter."""

import importlib.util
import os
import re

if "PYTEST_XDIST_WORKER" in os.environ:  # other workers need the other cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"

import pytest  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

if not GPU and importlib.util.find_spec("triton"):
    import triton_interpreter

    triton_interpreter.speed_up()

settings.register_profile(
    "tests", deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), print_blob=True
)
settings.load_profile("tests")

NEEDS_GPU = "needs a GPU"


def pytest_collection_modifyitems(items):
    for item in items:
        if " at 0x" in item.nodeid:  # an address: pytest-xdist refuses to run what workers call differently
            raise pytest.UsageError(f"the name {item.nodeid} is another one in each process; give it ids=")
        if item.get_closest_marker("gpu") and not GPU:
            item.add_marker(pytest.mark.skip(reason=NEEDS_GPU))
        if not GPU and re.search(r"[\[-]triton\b", item.name):
            item.add_marker(pytest.mark.slow)  # in its interpreter


def fail_if_skipped(report):
    """With CI=true a test fails that is skipped for anything but a GPU: it would never run anywhere."""
    if os.environ.get("CI") == "true" and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2].removeprefix("Skipped: ")
        if reason != NEEDS_GPU:
            report.outcome = "failed"
            report.longrepr = (
                f"skipped with CI=true: {reason}\n"
                "Install what it needs: pip install -e '.[test]'; apt-get install chromium"
            )
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    return fail_if_skipped((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report():
    return fail_if_skipped((yield))
