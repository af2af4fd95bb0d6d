"""Other encodings of signatures and keys, sent to a server with a real channel: no effect, and it settles (threat 17)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import httpx
import pytest
from bitcoin.core import Hash160

from paychan.protocol.address import encode_address, p2pkh_script
from paychan.protocol.payment import Payment
from paychan.protocol.types import Network
from tests.lib.customer import FUNDING_SAT, OPENING_SAT, Customer, CustomerV2, code, market, settled, wait_for
from tests.lib.ecdsa import der, high_s_twin
from tests.lib.node import Node
from tests.lib.system import System
from tests.lib.vectors import read_vectors

Market = tuple[System, Node]

VECTORS: dict[str, bytes] = {
    row["comment"]: bytes.fromhex(row["hex"]) for row in read_vectors("der_signatures.json")["invalid"]
}

REFUSALS = [(400, "signature_encoding"), (400, "malformed")]
"""In the second encoding, the lengths alone are impossible on the wire."""


@pytest.fixture(scope="module")
def market_place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Market]:
    with market(tmp_path_factory.mktemp("signature")) as place:
        yield place


def other_encodings(good: bytes) -> dict[str, bytes]:
    """Return encodings of a valid signature with R of 33 bytes that nodes do not relay or do not accept."""
    r, s = good[4:37], good[39:]
    assert (good[3], r[0], len(s)) == (33, 0, good[38])
    return {
        "high S": high_s_twin(good),
        "R negative": sequence(r[1:], s),
        "R padded": sequence(b"\x00" + r, s),
        "S padded": sequence(r, b"\x00" + s),
        "total length in two bytes": b"\x30\x81" + good[1:],
        "total length indefinite": b"\x30\x80" + good[2:] + b"\x00\x00",
        "R's length in two bytes": sized(b"\x02\x81" + good[3:]),
        "a byte behind": good + b"\x00",
        "a byte behind, counted": sized(good[2:] + b"\x00"),
        "R zero": der(0, int.from_bytes(s, "big")),
        "S zero": der(int.from_bytes(r, "big"), 0),
        "R empty": sequence(b"", s),
        "S empty": sequence(r, b""),
        "a byte short": good[:-1],
        "not DER": r[1:] + s.rjust(32, b"\x00"),
    }


def sequence(r: bytes, s: bytes) -> bytes:
    return sized(bytes([2, len(r)]) + r + bytes([2, len(s)]) + s)


def sized(integers: bytes) -> bytes:
    return bytes([0x30, len(integers)]) + integers


def with_long_r(customer: Customer, paid_sat: int) -> Payment:
    """Return the next payment from this amount on whose R has its top bit set: one in two."""
    return next(each for each in map(customer.payment, range(paid_sat, paid_sat + 1000)) if each.signature[3] == 33)


def refuse_all(good: Payment, send: Callable[[Payment], httpx.Response]) -> None:
    for name, signature in (other_encodings(good.signature) | VECTORS).items():
        answer = code(send(Payment(good.change_sat, signature, good.flag)))
        zero = name in ("R zero", "S zero")  # correct encoding, but not a valid signature
        assert answer in ([(400, "bad_signature")] if zero else REFUSALS), name


@pytest.mark.parametrize("kind", [Customer, CustomerV2], ids=["v1", "v2"])
def test_threat_17_other_encodings_of_a_true_signature_change_nothing(
    market_place: Market, kind: type[Customer]
) -> None:
    """Refused for opening, paying and closing; then the strict encoding is accepted, and the node accepts its settlement."""
    customer = kind(*market_place)
    customer.fund()
    customer.node.mine()
    good = with_long_r(customer, OPENING_SAT)
    refuse_all(good, customer.open_with)
    wait_for(lambda: customer.open_with(good).status_code == 201, "opened")
    before = customer.record
    assert (before["value_left"], before["payments"]) == (good.change_sat, 0)

    better = with_long_r(customer, FUNDING_SAT - good.change_sat + 1)
    refuse_all(better, customer.pay_with)
    refuse_all(good, customer.close_with)
    assert customer.record == before

    assert customer.pay_with(better).status_code == 200
    assert customer.close_with(better).status_code in (200, 202)
    (mined,) = settled(customer)
    assert mined[customer.change_script.hex()] == better.change_sat


def test_threat_17_other_encodings_of_a_key_open_nothing(market_place: Market) -> None:
    """Uncompressed and hybrid keys: no address in either version; coins on a script with such a key open nothing."""
    system, node = market_place
    customer = CustomerV2(system, node)
    compressed = customer.key.public_key.format()
    point = customer.key.public_key.format(compressed=False)[1:]
    hybrid = bytes([6 + point[-1] % 2]) + point
    template = customer.terms.redeem_script
    for key in (b"\x04" + point, hybrid, point, compressed[1:], b"\x05" + compressed[1:], compressed + b"\x00"):
        query = customer.query | {"client_pubkey": key.hex()}
        expiry, address = query["exp_time"], encode_address(p2pkh_script(Hash160(key)), Network.REGTEST)
        assert code(customer.ask("GET", "/v1/fundingInfo", **query)) == (400, "malformed")
        assert code(customer.ask("GET", f"/v2/funding/{expiry}/{key.hex()}/info")) == (400, "malformed")
        opening = customer.ask("POST", "/v1/channels/new", **query, change_address=address, payment="AAAA")
        assert code(opening) == (400, "malformed")
        customer.fund_odd(template[:-35] + bytes([len(key)]) + key + b"\xac")
        node.mine()
        assert code(customer.open()) == (400, "malformed")
    assert system.manage("GET", f"/channels/{customer.outpoint.txid_hex}/{customer.outpoint.vout}").status_code == 404
