"""The examples of the page run as they stand there: a server behind standard input, and a client that pays it."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

from paychan.client import Purse
from tests.lib.readme import ROOT

PAGE = (ROOT / "paychan" / "mcp" / "README.md").read_text()


def example(heading: str, **changes: str) -> str:
    """Return the first Python example under a heading, with texts replaced."""
    section = PAGE.partition(f"\n## {heading}\n")[2]
    found = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert found, heading
    code = found[1]
    for before, after in changes.items():
        assert before in code
        code = code.replace(before, after)
    return code


def test_the_examples_sell_and_pay(
    merchant: Path,
    purse: Purse,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    pay_url: str,
) -> None:
    """The client starts the server, pays 25 sat, and prints the tile."""
    from paychan.client import Payer

    program = tmp_path / "maps.py"
    program.write_text(example("Sell", **{".paychan/debug/merchant.sock": str(merchant)}))
    with Payer(pay_url, wallet=purse.wallet.directory) as payer:
        payer.channel_for(room_sat=100)
    monkeypatch.setenv("PAYCHAN_WALLET", str(purse.wallet.directory))
    environment = f'"{program}"], env={ {**os.environ, "PYTHONPATH": str(ROOT)}!r}'
    code = example("Pay", **{'"maps.py"]': environment, 'command="python"': f'command="{sys.executable}"'})
    exec(compile(code, "README.md", "exec"), {})
    assert capfd.readouterr().out == "tile 3\n"
    assert purse.log.account().total_sat == 25
