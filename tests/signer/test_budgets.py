"""Each kind of request has a separate budget: no kind uses up the budget of another."""

from __future__ import annotations

from paychan.protocol.types import UnixTime
from paychan.protocol.wire.signer_messages import (
    AgainRequest,
    CertificateRequest,
    Health,
    KeyRequest,
    NewestRequest,
    Refusal,
    Request,
    ReserveRequest,
    StatusRequest,
)
from signer.judge.facts import Limits
from signer.keys.ring import KeyRing, hardened_keys
from tests.lib.looped import looped
from tests.signer.messages import (
    CLIENT_KEY,
    EXPIRY,
    make_child_request,
    make_fundings,
    make_handler,
    make_request,
    mutated,
)

KEYS = KeyRing([hardened_keys(bytes(32))])
REQUEST = make_request(KEYS)
SETTLING: dict[str, Request] = {
    "settlement": REQUEST,
    "dearer settlement": mutated(REQUEST, "fee_sat", 6_000),
    "child": make_child_request(mutated(REQUEST, "fee_sat", 6_000)),
    "again": AgainRequest(5, REQUEST.claims[0].outpoint),
    "funding": make_fundings(make_request(KEYS, drained=2))[2],
    "reserve": ReserveRequest(4),
    "key to settle": KeyRequest(3, CLIENT_KEY, EXPIRY, settling=True),
}
STATUS: dict[str, Request] = {"health": Health(1), "status": StatusRequest(2)}
FLOODS: dict[str, Request] = {
    "keys of strangers": KeyRequest(3, CLIENT_KEY, UnixTime(EXPIRY + 5)),
    "newest payments": NewestRequest(6, REQUEST.claims),
    "certificates": CertificateRequest(7, CLIENT_KEY, UnixTime(1_000), UnixTime(2_000)),
    **STATUS,
}


def refused(reply: object) -> bool:
    return isinstance(reply, Refusal)


@looped("flood", FLOODS)
def test_fault_67_no_flood_holds_up_settlements_or_the_operator(flood: str) -> None:
    """During ten thousand requests of one kind, all settling requests are signed and the operator is answered."""
    handler = make_handler(KEYS, REQUEST, limits=Limits(requests_per_second=5), clock=lambda: 1_000.0)
    over = [handler(FLOODS[flood]) for _ in range(10_000)]
    assert any(map(refused, over)) == (flood not in STATUS)

    replies = {name: handler(request) for name, request in (SETTLING | STATUS).items()}

    assert [name for name, reply in replies.items() if refused(reply)] == []


def test_fault_67_settlements_hold_up_neither_operator_nor_keys() -> None:
    """A hostile server that requests settlements without end does not keep the operator from seeing it."""
    handler = make_handler(KEYS, REQUEST, limits=Limits(requests_per_second=5), clock=lambda: 1_000.0)
    assert any(refused(handler(REQUEST)) for _ in range(1_000))

    for request in (*STATUS.values(), FLOODS["keys of strangers"]):
        assert not refused(handler(request))


def test_fault_67_a_key_that_is_needed_to_settle_is_no_strangers() -> None:
    """A key request marked as settling, by mistake or malice, uses the settling budget and no other."""
    handler = make_handler(KEYS, REQUEST, limits=Limits(requests_per_second=2, keys_per_second=3), clock=lambda: 1e6)
    settling = [refused(handler(SETTLING["key to settle"])) for _ in range(30)]
    strangers = [refused(handler(FLOODS["keys of strangers"])) for _ in range(40)]

    assert settling.count(False) == 20 - len(make_fundings(REQUEST))
    assert strangers.count(False) == 30
