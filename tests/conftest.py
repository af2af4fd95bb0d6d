"""Rules for the whole suite."""

from __future__ import annotations

import os

import pytest

os.environ.pop(
    "COLUMNS", None
)  # 80 in workers of pytest-xdist: what our programs print shall be as wide as where nobody looks


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    """Say of a failed test where its logs are; with PAYCHAN_NO_SKIPS=1, as in CI, a skipped test is a failed one."""
    outcome = yield
    report = outcome.get_result()
    if os.environ.get("PAYCHAN_NO_SKIPS") and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped where nothing may be skipped: {report.longrepr}"
    if report.failed:
        report.sections.append(("folder", str(item.config._tmp_path_factory.getbasetemp())))
