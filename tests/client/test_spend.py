"""The change after a payment: never dust, never more than before, never less than intended (threats 13, 41)."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paychan.client import (
    ChannelRecord,
    Declined,
    InsufficientFunds,
    Limits,
    OverLimit,
    Patience,
    Refused,
    ServerMisbehaved,
    State,
    Unreachable,
    WouldLeaveDust,
    WouldTakeBack,
)
from paychan.client.flows.pay import pay
from paychan.client.spend import next_change
from paychan.client.transport.effects import Flow, Request, Response, Save
from paychan.protocol.payment import decode_v1
from paychan.protocol.types import Network, Sat, UnixTime
from paychan.protocol.wire.rbpcp import Dialect
from tests.lib.channels import Payer as Someone

DUST_SAT = 700
FUNDING_SAT = 1_000_000
NO_LIMIT = Limits(payment_sat=10**15)
ONCE = Patience(attempts=1)
SOMEONE = Someone("spender")


def record_of(**changes: Any) -> ChannelRecord:
    """An open v1 channel of 1,000,000 sat with 10,000 paid."""
    record = ChannelRecord(
        name="spender",
        url="http://127.0.0.1:1",
        version=1,
        dialect=Dialect.S,
        network=Network.TEST,
        private_key=SOMEONE.key.to_hex(),
        server_key=SOMEONE.server_key.public_key.format().hex(),
        expiry=SOMEONE.expiry,
        funding_address=SOMEONE.terms.funding_address(Network.TEST),
        created_at=UnixTime(0),
        open_price_sat=Sat(10_000),
        dust_sat=Sat(DUST_SAT),
        min_confirmations=0,
        settlement_period_hours=6,
        change_address="mm9mm96b8bZRBacaAvY5MEeDd6HW46qFcY",
        location="/v1/channels/x",
        funding_outpoint=str(SOMEONE.outpoint),
        funding_sat=Sat(FUNDING_SAT),
        state=State.OPEN,
        signed_sat=Sat(990_000),
        acknowledged_sat=Sat(990_000),
    )
    return msgspec.structs.replace(record, **changes)


@pytest.mark.parametrize(
    ("amount_sat", "outcome"),
    [
        (1, 989_999),
        (990_000 - DUST_SAT - 1, DUST_SAT + 1),
        (990_000 - DUST_SAT, DUST_SAT),
        (990_000 - DUST_SAT + 1, WouldLeaveDust),
        (990_000 - 1, WouldLeaveDust),
        (990_000, WouldLeaveDust),
        (990_001, InsufficientFunds),
        (10**18, OverLimit),
        (-1, ValueError),
    ],
)
def test_threat_41_limits_of_a_payment(amount_sat: int, outcome: int | type[Exception]) -> None:
    """Change stays at the dust limit or above; paying everything needs `drain`."""
    if isinstance(outcome, int):
        assert next_change(record_of(), amount_sat, NO_LIMIT, drain=False) == outcome
    else:
        with pytest.raises(outcome):
            next_change(record_of(), amount_sat, NO_LIMIT, drain=False)


def test_the_choice_at_the_end_of_a_channel_is_clear() -> None:
    """The refusal to leave dust names the largest possible payment, and drain."""
    with pytest.raises(WouldLeaveDust, match="drain") as caught:
        next_change(record_of(), 989_900, NO_LIMIT, drain=False)

    assert caught.value.fields == {"change_sat": 100, "dust_sat": DUST_SAT, "most_sat": 990_000 - DUST_SAT}
    assert next_change(record_of(), 989_900, NO_LIMIT, drain=True) == 0


def test_threat_41_a_payment_above_the_limit_is_declined() -> None:
    """A payment above the payer's own limit is not signed (threat 41)."""
    with pytest.raises(OverLimit) as caught:
        next_change(record_of(), 5_001, Limits(payment_sat=5_000), drain=False)

    assert caught.value.fields == {"got_sat": 5_001, "limit_sat": 5_000}
    assert next_change(record_of(), 5_000, Limits(payment_sat=5_000), drain=False) == 985_000


def test_a_payment_after_a_refusal_covers_the_refused_one() -> None:
    """The next payment is at least the payment that the server refused but may use."""
    record = record_of(signed_sat=Sat(989_900), refused=True)

    with pytest.raises(WouldTakeBack):
        next_change(record, 99, NO_LIMIT, drain=False)
    assert next_change(record, 100, NO_LIMIT, drain=False) == 989_900


def test_a_payment_of_nothing_is_a_mistake() -> None:
    """Paying 0 by mistake raises instead of repeating the last payment."""
    with pytest.raises(ValueError, match="at least 1 sat"):
        next(pay(record_of(), 0, NO_LIMIT, ONCE, drain=False, application_data=""))


ANSWERS = st.sampled_from(["accept", "refuse", "busy", "silent", "lie", "close"])


def judge(answer: str, request: Request, record: ChannelRecord) -> Response | None:
    """Possible answers of a server to a payment."""
    change = decode_v1(request.url.rpartition("payment=")[2]).change_sat
    result = {
        "channel_status": "closed" if change == 0 else "open",
        "channel_value_left": change,
        "value_received": record.agreed_sat - change,
        "settlement_txid": None,
    }
    replies = {
        "accept": Response(200, "", {}, json.dumps(result).encode()),
        "lie": Response(200, "", {}, json.dumps(result | {"channel_value_left": 0, "value_received": 1}).encode()),
        "refuse": Response(400, "", {}, b'{"code":"application_error","error":"no"}'),
        "busy": Response(503, "", {}, b""),
        "close": Response(410, "", {}, b'{"code":"channel_closing","error":"closing"}'),
    }
    return replies.get(answer)


def run(flow: Flow[Any], record: ChannelRecord, answer: str) -> tuple[ChannelRecord, list[int]]:
    """Run a flow against one answer; return the final record and the change values that were sent."""
    sent: list[int] = []
    reply: Response | None = None
    try:
        while True:
            effect = flow.send(reply)
            reply = None
            if isinstance(effect, Save):
                record = effect.record
            elif isinstance(effect, Request):
                sent.append(decode_v1(effect.url.rpartition("payment=")[2]).change_sat)
                assert sent[-1] == record.signed_sat, "sent an unsaved payment"
                reply = judge(answer, effect, record)
    except StopIteration:
        return record, sent
    except Exception as error:
        if not isinstance(error, Declined | Refused | ServerMisbehaved | Unreachable):
            raise
        return record, sent


@given(st.lists(st.tuples(st.integers(1, 400_000), st.booleans(), ANSWERS), max_size=12))
def test_whatever_the_server_answers_signed_payments_only_grow(steps: list[tuple[int, bool, str]]) -> None:
    """Over any history of payments and answers, change never grows, is never dust, and only drain pays everything."""
    record, left = record_of(), 990_000
    for amount_sat, drain, answer in steps:
        flow = pay(record, 0 if drain else amount_sat, NO_LIMIT, ONCE, drain=drain, application_data="")
        before, known = record, record.agreed_sat
        record, sent = run(flow, record, answer)
        if before.unacknowledged and not before.refused and sent:
            assert sent[0] == before.signed_sat, "an earlier payment without an answer is finished first"
            known = sent.pop(0)
        for change in sent:
            assert change <= left
            assert change == 0 if drain else change >= DUST_SAT
            assert drain or known - change == amount_sat
            left = change
        assert record.left_sat == left
