"""A real bitcoind relays and mines settlements and refunds of a second channel kind, alone and beside RBPCP's."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from paychan.protocol.channel import CloseReason, State
from paychan.protocol.kinds.refund import sign_refund
from paychan.protocol.settlement import Claim, Settlement, sign_settlement
from paychan.protocol.types import Network, Sat, UnixTime
from tests.lib.channels import DAY_SECONDS, SERVER_DESTINATION, Payer
from tests.lib.node import Node
from tests.lib.p2wsh import SegwitPayer, registered

FUNDING_SAT = Sat(1_000_000)


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    with Node(tmp_path_factory.mktemp("second") / "node", zmq=False) as node, registered():
        yield node


def funded(node: Node, payer: Payer) -> Payer:
    """The same client, whose channel is funded on the chain."""
    payer = msgspec.structs.replace(payer, funding_sat=FUNDING_SAT, expiry=UnixTime(int(time.time()) + DAY_SECONDS))
    outpoint = node.fund(payer.terms.funding_address(Network.REGTEST), FUNDING_SAT)
    node.mine()
    return msgspec.structs.replace(payer, at=outpoint)


def verdict(node: Node, transaction: bytes) -> dict[str, Any]:
    """The node's verdict about a transaction that it has not seen."""
    (answer,) = node.rpc("testmempoolaccept", [transaction.hex()])
    assert isinstance(answer, dict)
    return answer


def settled(payers: list[Payer], changes: list[int], fee_sat: int) -> Settlement:
    """A settlement of these channels, which leave this change."""
    claims = [
        Claim(payer.terms, payer.outpoint, FUNDING_SAT, payer.change_script, payer.payment(change))
        for payer, change in zip(payers, changes, strict=True)
    ]
    return sign_settlement(
        claims, SERVER_DESTINATION, Sat(fee_sat), lambda at, digest: payers[at].server_key.sign(digest, hasher=None)
    )


def test_a_settlement_is_relayed_and_mined(node: Node) -> None:
    """The machine's settlement passes every rule of the node, has the stated size, and confirms under its txid."""
    payer = funded(node, SegwitPayer("settled"))
    channel = payer.history(State.CLOSING, paid_sat=50_000, reason=CloseReason.OPERATOR)[-1]
    assert channel.closing is not None
    assert channel.closing.settlement is not None
    settlement = channel.closing.settlement

    answer = verdict(node, settlement.transaction)

    assert answer["allowed"], answer
    assert (answer["txid"], answer["vsize"]) == (settlement.txid[::-1].hex(), settlement.size)
    assert int(answer["fees"]["base"].scaleb(8)) == settlement.fee_sat
    block = node.rpc("getblock", node.mine_only(settlement.transaction.hex()))
    assert answer["txid"] in block["tx"]


def test_both_kinds_are_mined_in_one_settlement(node: Node) -> None:
    """Two claims of the second kind leave change behind one of the first, and a drained one follows."""
    payers = [funded(node, payer) for payer in (Payer("a"), SegwitPayer("b"), SegwitPayer("c"), SegwitPayer("d"))]
    settlement = settled(payers, [700_000, 800_000, 900_000, 0], 3_000)

    answer = verdict(node, settlement.transaction)

    assert answer["allowed"], answer
    assert answer["vsize"] == settlement.size
    node.mine_only(settlement.transaction.hex())


def test_a_payment_for_another_value_is_refused(node: Node) -> None:
    """The node checks what the verifier checks: the client's signature commits to the funding value."""
    payer = funded(node, SegwitPayer("other value"))
    wrong = msgspec.structs.replace(payer, funding_sat=Sat(FUNDING_SAT - 1))

    answer = verdict(node, settled([wrong], [900_000], 1_000).transaction)

    assert not answer["allowed"]
    assert "script-verify-flag" in answer["reject-reason"]


def test_a_refund_is_valid_after_the_expiry_alone(node: Node) -> None:
    """Before the expiry the refund is not final; after it, it is relayed and mined."""
    payer = funded(node, SegwitPayer("refunded"))
    refund = sign_refund(payer.key, payer.terms, payer.outpoint, FUNDING_SAT, SERVER_DESTINATION, Sat(500))

    assert verdict(node, refund.transaction)["reject-reason"] == "non-final"
    node.pass_median_time(payer.terms.expiry.unix_time)
    answer = verdict(node, refund.transaction)

    assert answer["allowed"], answer
    assert answer["vsize"] == refund.size
    node.mine_only(refund.transaction.hex())
