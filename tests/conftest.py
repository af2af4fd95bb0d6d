"""Rules for the whole suite."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
from hypothesis import settings

from tests.lib import campaign, compiled

TESTS = Path(__file__).parent
QUICK = {"protocol", "actors", "config", "cli", "gateway"}
"""Folders whose tests need no other process: `pytest -m quick` runs them in under a minute."""

SLOWEST = (
    "functional/test_installs.py", "functional/test_regtest_steps.py", "signer/test_hostile_server.py",
    "functional/test_regtest_withdraw.py", "functional/test_regtest_fees.py", "functional/test_up.py",
    "functional/test_regtest_payer.py", "functional/test_regtest_payer_coins.py", "functional/test_signer_away.py",
    "functional/test_damaged_store.py", "functional/test_secrets_stay_inside.py", "functional/test_scale.py",
    "signer/test_flood.py", "functional/test_clock.py", "functional/test_degraded_start.py",
    "functional/test_fee_spike.py", "crash/test_kill.py", "api/test_stream_hostile.py",
    "functional/test_node_families.py", "functional/test_pages_commands.py", "api/test_callback.py",
    "crash/test_settling_kills.py", "functional/test_mistakes.py", "functional/test_up_terminal.py",
    "functional/test_node_cli.py", "api/test_connections.py", "actors/test_growth.py", "property/test_moving.py",
    "signer/test_memory_limit.py", "signer/test_commands_terminal.py",
)  # fmt: skip
"""The files that take longest, the slowest first; measured side by side, as the suite runs them."""

settings.register_profile("any machine", deadline=None)  # a slow machine is no failure
settings.load_profile("any machine")

os.environ.pop(
    "PYTHONDONTWRITEBYTECODE", None
)  # some hundred processes start, and each would compile all modules again
sys.dont_write_bytecode = False

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell starts background jobs so, and programs inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ.pop(
    "COLUMNS", None
)  # 80 in workers of pytest-xdist: the tests expect the width of output without a terminal


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--campaign`."""
    parser.addoption(
        "--campaign", action="store_true", help="run kills, fee spikes and scans at full length (half an hour)"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Pass the size of campaigns to test modules and workers of pytest-xdist; compile before workers start."""
    if config.getoption("campaign"):
        os.environ[campaign.VARIABLE] = "1"
    if config.getoption("numprocesses", None):  # the process that starts the workers
        compiled.compile_missing()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the quick ring. Run the slowest files first; otherwise one of them would run alone at the end.

    A name with an address in memory differs between workers, and then none of them runs a test.
    """
    for item in items:
        if " at 0x" in item.name:
            msg = f"{item.nodeid}: give its parameters names that are the same in each process (`ids=`)"
            raise pytest.UsageError(msg)
        if item.path.relative_to(TESTS).parts[0] in QUICK:
            item.add_marker("quick")
    rank = {TESTS / name: number for number, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: rank.get(item.path, len(rank)))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    """Show the logs of a failed test. With PAYCHAN_NO_SKIPS=1, as in CI, a skipped test counts as failed."""
    outcome = yield
    report = outcome.get_result()
    if os.environ.get("PAYCHAN_NO_SKIPS") and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped where nothing may be skipped: {report.longrepr}"
    if report.failed:
        report.sections.append(("folder", str(item.config._tmp_path_factory.getbasetemp())))
