"""The signer judges, signs and remembers a channel of a second kind by the rules of every channel."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from bitcoin.core import COutPoint, CTransaction, CTxIn, CTxOut
from bitcoin.core.script import CScript

from paychan.protocol.kinds.base import make_terms
from paychan.protocol.payment import sign_payment
from paychan.protocol.settlement import Claim
from paychan.protocol.types import OutPoint, Sat
from paychan.protocol.wire.signer_messages import (
    AgainReply,
    AgainRequest,
    FundingReply,
    FundingRequest,
    Refusal,
    SettlementReply,
    SettlementRequest,
    WireError,
    decode_request,
    encode_frame,
)
from paychan.signer_client.reply_checks import check_settlement
from signer.judge.facts import Limits
from signer.keys.ring import KeyRing, hardened_keys
from tests.lib.kernel import interpreter_accepts
from tests.lib.p2wsh import P2WSH, forget, registered
from tests.signer.messages import (
    CHANGE_SCRIPT,
    CLIENT,
    CLIENT_KEY,
    EXPIRY,
    destination,
    make_handler,
    mutated,
    server_key,
)

KEYS = KeyRing([hardened_keys(bytes(32))])
FUNDING_SAT = Sat(1_000_000)


@pytest.fixture(autouse=True)
def second_kind() -> Iterator[None]:
    """Both kinds are known."""
    with registered():
        yield


@pytest.fixture
def handler() -> Any:
    """A signer that was shown the funding of `request_`."""
    made = make_handler(KEYS, limits=Limits(max_fee_percent=100, max_fee_sat=10**9, max_fee_sat_per_vb=10_000))
    assert isinstance(made(FundingRequest(1, funding().serialize(), (0,))), FundingReply)
    return made


def funding() -> CTransaction:
    """A transaction that funds the channel."""
    return CTransaction([CTxIn(COutPoint(b"\x07" * 32, 0))], [CTxOut(FUNDING_SAT, CScript(terms().funding_script))])


def terms() -> Any:
    return make_terms(server_key(KEYS), CLIENT_KEY, EXPIRY, tag=P2WSH.tag)


def request_(change_sat: int = 400_000, claimed_sat: int = FUNDING_SAT, script: bytes = CHANGE_SCRIPT) -> Any:
    """The settlement of the channel, whose client signed for this value of the funding."""
    outpoint = OutPoint(funding().GetTxid(), 0)
    payment = sign_payment(CLIENT, terms(), outpoint, Sat(claimed_sat), script, Sat(change_sat))
    claim = Claim(terms(), outpoint, Sat(claimed_sat), script, payment)
    return SettlementRequest(2, (claim,), destination(KEYS), Sat(3_000))


@pytest.mark.parametrize("script", [CHANGE_SCRIPT, None], ids=["change to a key", "change funds the channel again"])
def test_a_settlement_is_signed_and_returned_again(handler: Any, script: bytes | None) -> None:
    """Core accepts what the signer signed; the reply passes the server's checks, and comes again with its request."""
    request = request_(script=script or terms().funding_script)
    reply = handler(request)

    assert isinstance(reply, SettlementReply), reply
    check_settlement(reply.settlement, request)
    assert interpreter_accepts(terms().funding_script, reply.settlement.transaction, 0, FUNDING_SAT)
    again = handler(AgainRequest(3, request.claims[0].outpoint))
    assert isinstance(again, AgainReply)
    assert (again.claim, again.settlement) == (request.claims[0], reply.settlement)


def test_the_watermark_and_the_value_hold(handler: Any) -> None:
    """No client gets more than before, and a value that was not shown is refused, though the client signed for it."""
    assert isinstance(handler(request_()), SettlementReply)

    for wrong, tag in [(request_(400_001), "policy-watermark"), (request_(claimed_sat=999_999), "policy-fee")]:
        refusal = handler(wrong)
        assert isinstance(refusal, Refusal)
        assert refusal.tag == tag


def test_the_same_terms_of_the_first_kind_are_another_channel(handler: Any) -> None:
    """A claim whose kind was exchanged does not fit the funding that was shown."""
    request = request_()
    exchanged = msgspec.structs.replace(request.claims[0].terms, tag="p2sh")
    refusal = handler(mutated(request, "claims.0.terms", exchanged))

    assert isinstance(refusal, Refusal)
    assert refusal.tag == "policy-template"


def test_an_unknown_kind_is_no_message() -> None:
    """The kind crosses the socket; a signer that does not know it refuses the message."""
    frame = encode_frame(request_())
    assert decode_request(frame[4:]) == request_()

    forget()
    with pytest.raises(WireError, match="unknown channel kind 'p2wsh'"):
        decode_request(frame[4:])
