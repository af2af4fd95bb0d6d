"""A v2 payer whose channel the server may move."""

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
    """A client whose change funds the channel again."""
    payer = Payer()
    payer.change_script = payer.terms.funding_script
    payer.change_address = payer.terms.funding_address(Network.TEST)
    return payer


def open_movable(url: str, http: httpx.Client, dialect: Dialect) -> V2:
    """Open a channel that has received 100,001 satoshi, in two payments: the opening one alone is not withdrawn."""
    v2 = V2(url, movable_payer(), http, dialect)
    assert v2.open(v2.payer.payment(100_000)).status_code == 201
    assert v2.pay(v2.payer.payment(OPENED_SAT)).status_code == 200
    return v2


def withdraw(system: System, outpoint: OutPoint) -> dict[str, Any]:
    """What the operator is answered; in debug mode the settlement is deep in the chain at once."""
    answer = system.manage("POST", path(outpoint).removeprefix("/v2") + "/withdraw")
    assert answer.status_code == 200, answer.text
    told: dict[str, Any] = answer.json()
    return told


def go_along(v2: V2, shown: dict[str, Any]) -> int:
    """Pay from the new output from now on; what it holds."""
    transaction = CTransaction.deserialize(bytes.fromhex(shown["transaction"]))
    v2.payer.outpoint = OutPoint(bytes(transaction.GetTxid()), 0)
    return int(transaction.vout[0].nValue)
