"""The operator sees outputs at channels' addresses that fund no channel: second, late and short deposits."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from paychan.cli.main import app
from tests.lib.customer import FUNDING_SAT, OPENING_SAT, Customer, CustomerV2, market, settled, wait_for


@pytest.mark.parametrize("kind", [Customer, CustomerV2])
def test_the_operator_sees_deposits_that_no_channel_holds(tmp_path: Path, kind: type[Customer]) -> None:
    """A second deposit before the opening, a short one during the channel, a late one after its end; each with its owner."""
    with market(tmp_path) as (system, node):

        def listed() -> dict[str, tuple[int, str, str]]:
            found = system.manage("GET", "/deposits").json()["deposits"]
            return {each["outpoint"]: (each["value_sat"], each["channel"], each["sender"]) for each in found}

        customer, other = kind(system, node), kind(system, node)
        other.opened()
        second = node.fund(customer.address, 300_000)
        customer.opened()
        key = customer.query["client_pubkey"]
        expected = {str(second): (300_000, str(customer.outpoint), key)}
        assert listed() == expected
        short = node.fund(customer.address, 1_000)
        expected[str(short)] = (1_000, str(customer.outpoint), key)
        wait_for(lambda: listed() == expected, "the short deposit")
        customer.close(OPENING_SAT)
        settled(customer)
        late = node.fund(customer.address, FUNDING_SAT)
        expected[str(late)] = (FUNDING_SAT, str(customer.outpoint), key)
        wait_for(lambda: listed() == expected, "the late deposit")
        system.restart_server()
        wait_for(lambda: listed() == expected, "all after a restart")
        shown = CliRunner().invoke(app, ["channels", "deposits", str(system.server_file), "--json"])
        assert all(outpoint in shown.output for outpoint in expected)
