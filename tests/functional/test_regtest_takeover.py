"""A server under an attacker's control, on a real node: it asks the real signer to settle for a colluding client."""

from __future__ import annotations

from pathlib import Path

import httpx

from paychan.protocol.settlement import Claim
from paychan.protocol.types import Sat
from paychan.protocol.wire.signer_messages import KeyReply, KeyRequest, Refusal, SettlementReply, SettlementRequest
from tests.lib.customer import FUNDING_SAT, OPENING_SAT, Customer, market, wait_for
from tests.signer.talking import ask


def test_fault_73_the_opening_payment_is_worth_nothing_after_the_takeover(tmp_path: Path) -> None:
    """The server had shown the signer the newest payment: the signer signs no older one, at any fee."""
    with market(tmp_path, sections={"signer": "show_seconds = 0.2"}) as (system, node):
        mallory = Customer(system, node)
        mallory.opened()
        assert mallory.pay(600_000).status_code == 200
        audit = system.state / "signer.audit"
        wait_for(lambda: '"received_sat":600000' in audit.read_text(), "shown to the signer")
        tasks = httpx.get(f"{system.management_url}/health", timeout=30, verify=False).json()
        assert "payments shown" in str(tasks)
        system.kill_server()

        assert tag_of(mallory, OPENING_SAT) == "policy-watermark"
        assert tag_of(mallory, OPENING_SAT, fee_sat=40_000) == "policy-watermark"
        assert tag_of(mallory, 599_999) == "policy-watermark"
        assert tag_of(mallory, 600_000, fee_sat=300_000) == "policy-fee"
        assert tag_of(mallory, 600_000) == ""


def tag_of(customer: Customer, paid_sat: int, fee_sat: int = 5_000) -> str:
    """Return the tag with which the signer refuses this payment; "" if it settles it."""
    socket = customer.system.state / "signer.sock"
    key = ask(socket, KeyRequest(1, customer.terms.client_key, customer.terms.expiry.lock_time, settling=True))
    assert isinstance(key, KeyReply)
    claim = Claim(
        customer.terms, customer.outpoint, Sat(FUNDING_SAT), customer.change_script, customer.payment(paid_sat)
    )
    reply = ask(socket, SettlementRequest(2, (claim,), key.destination_script, Sat(fee_sat)))
    assert isinstance(reply, Refusal | SettlementReply)
    return reply.tag if isinstance(reply, Refusal) else ""
