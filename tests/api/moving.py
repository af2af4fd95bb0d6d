"""A v2 payer from whose channel the server may withdraw."""

from __future__ import annotations

from typing import Any

import httpx
from bitcoin.core import CTransaction

from paychan.protocol.types import Network, OutPoint
from paychan.protocol.wire.rbpcp import Dialect
from tests.lib.rbpcp import V2, Payer, path
from tests.lib.system import System

OPENED_SAT = 100_001


def movable_payer() -> Payer:
    """Make a payer whose change address is the funding address, so that the channel continues after a withdrawal."""
    payer = Payer()
    payer.change_script = payer.terms.funding_script
    payer.change_address = payer.terms.funding_address(Network.TEST)
    return payer


def open_movable(url: str, http: httpx.Client, dialect: Dialect) -> V2:
    """Open a channel with 100,001 satoshi received in two payments: an opening payment alone can't be withdrawn."""
    v2 = V2(url, movable_payer(), http, dialect)
    assert v2.open(v2.payer.payment(100_000)).status_code == 201
    assert v2.pay(v2.payer.payment(OPENED_SAT)).status_code == 200
    return v2


def withdraw(system: System, outpoint: OutPoint) -> dict[str, Any]:
    """Withdraw as the operator and return the answer; in debug mode the settlement has its confirmations at once."""
    response = system.manage("POST", path(outpoint).removeprefix("/v2") + "/withdraw")
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def follow_move(v2: V2, shown: dict[str, Any]) -> int:
    """Let the payer pay from the new output from now on; return its value in satoshi."""
    transaction = CTransaction.deserialize(bytes.fromhex(shown["transaction"]))
    v2.payer.outpoint = OutPoint(bytes(transaction.GetTxid()), 0)
    return int(transaction.vout[0].nValue)
