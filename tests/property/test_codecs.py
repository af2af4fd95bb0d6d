"""All readers of foreign bytes or text: each returns a value or raises its own error, and no other exception."""

from __future__ import annotations

import base64
import json
import zlib
from typing import Any

import msgspec
from hypothesis import example, given
from hypothesis import strategies as st

from paychan.protocol.address import decode_address, encode_address, witness_script
from paychan.protocol.bech32 import encode_program
from paychan.protocol.errors import BadRequest, DamagedRecord, Malformed
from paychan.protocol.expiry import MAX_EXPIRY, MIN_EXPIRY
from paychan.protocol.keys import parse_public_key
from paychan.protocol.kinds.base import make_terms
from paychan.protocol.kinds.p2sh import parse_redeem_script
from paychan.protocol.payment import Payment, decode_v1, encode_v1
from paychan.protocol.record import VERSION, decode_record, encode_record
from paychan.protocol.types import MAX_MONEY_SAT, Network, OutPoint, Sat
from paychan.protocol.wire.rbpcp import Dialect, encode_json, payment_data, read_secret, read_v2_body
from paychan.protocol.wire.signer_messages import WireError, decode_reply, decode_request
from tests.lib.channels import private_key
from tests.vectors.record.generate import samples

amounts = st.integers(0, MAX_MONEY_SAT)
signatures = st.binary(min_size=6, max_size=70).map(lambda body: bytes([0x30, len(body)]) + body)
payments = st.builds(Payment, amounts.map(Sat), signatures, st.integers(0, 255))
txids = st.binary(min_size=32, max_size=32)
outpoints = st.builds(OutPoint, txids, st.integers(0, 2**32 - 1))
hexish = st.text("0123456789abcdefABCDEF \n", max_size=80)

# --- v1 -------------------------------------------------------------------------------------------------------------


@given(payments)
def test_v1_round_trip(payment: Payment) -> None:
    """A written payment is read back, padded or not, in either alphabet."""
    text = encode_v1(payment)
    padded = text + "=" * (-len(text) % 4)

    assert decode_v1(text) == decode_v1(padded) == payment
    assert decode_v1(padded.replace("-", "+").replace("_", "/")) == decode_v1(padded.replace("-", " ")) == payment


@given(
    st.text() | st.text("ABCDabcd0123-_+/= ") | st.binary(max_size=120).map(lambda raw: base64.b64encode(raw).decode())
)
def test_v1_reads_or_refuses(text: str) -> None:
    """Any text gives a payment or `Malformed`; a payment encodes to its own text again."""
    try:
        payment = decode_v1(text)
    except Malformed:
        return

    assert decode_v1(encode_v1(payment)) == payment


# --- v2 -------------------------------------------------------------------------------------------------------------

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | hexish,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
KEYS = ("redeem_script", "funding_txid", "funding_vout", "signature_data", "change_value", "change_address")
bodies = st.dictionaries(st.sampled_from([*KEYS, "sighash_flag", "payment_data", "application_data"]), json_values)


@given(payments, st.sampled_from(Dialect), outpoints, st.binary(max_size=81), st.booleans(), st.text())
def test_v2_round_trip(
    payment: Payment, dialect: Dialect, outpoint: OutPoint, script: bytes, wrapped: bool, data: str
) -> None:
    """The body of a client of either dialect is read back: payment, facts, dialect and application data."""
    facts = {"funding_txid": outpoint.txid_hex, "funding_vout": outpoint.vout, "redeem_script": script.hex()}
    written = payment_data(payment, dialect, **facts)
    data = data.encode("utf-8", "ignore").decode()

    body = read_v2_body(encode_json({"payment_data": written, "application_data": data} if wrapped else written))

    assert (body.payment, body.dialect, body.outpoint, body.redeem_script) == (payment, dialect, outpoint, script)
    assert body.application_data == (data if wrapped else "")


@given(st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_v2_reads_or_refuses_bytes(raw: bytes) -> None:
    """Any bytes give a body or a bad request."""
    refused_or(BadRequest, read_v2_body, raw)


@given(
    bodies
    | st.fixed_dictionaries({"payment_data": bodies, "application_data": json_values})
    | st.fixed_dictionaries({"signature_data": st.just("300602011102012283"), "change_value": json_values | amounts})
)
@example({"signature_data": "30", "change_value": True})
@example({"signature_data": "30060201110201228", "change_value": 10**400})
def test_v2_reads_or_refuses_json(body: dict[str, Any]) -> None:
    """Any values under the known keys give a body or a bad request; only integers are accepted as amounts."""
    read = refused_or(BadRequest, read_v2_body, json.dumps(body).encode())

    if read is not None:
        data = body.get("payment_data", body)
        assert type(data["change_value"]) is int
        assert read.payment.change_sat == data["change_value"]


@given(st.text() | hexish)
def test_secrets_are_read_or_none(text: str) -> None:
    """Any text gives a secret of 32 bytes or None."""
    secret = read_secret(text)

    assert secret is None or text.lower().strip('"') == secret.hex()


# --- keys, scripts, addresses, outpoints ----------------------------------------------------------------------------


@given(st.text() | hexish | txids.map(lambda x: "02" + x.hex()))
def test_public_keys_are_read_or_refused(text: str) -> None:
    """Any text gives a key with the same text, or a bad request."""
    key = refused_or(BadRequest, parse_public_key, text)

    assert key is None or key.hex() == text


@given(st.binary(min_size=78, max_size=83) | st.binary(max_size=200))
def test_redeem_scripts_are_read_or_refused(script: bytes) -> None:
    """Any bytes give a redeem script or a bad request."""
    terms = refused_or(BadRequest, parse_redeem_script, script)

    assert terms is None or terms.redeem_script == script


@given(st.integers(MIN_EXPIRY, MAX_EXPIRY), st.integers(0, 50), st.integers(51, 100))
def test_redeem_scripts_round_trip(expiry: int, server: int, client: int) -> None:
    """Terms are read back from their own script, for any keys and expiry."""
    terms = make_terms(*(private_key(str(seed)).public_key.format() for seed in (server, client)), expiry)

    assert parse_redeem_script(terms.redeem_script) == terms
    assert len(terms.redeem_script) == (80 if expiry < 2**31 else 81)


@given(st.text(max_size=50) | st.text("123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz", max_size=40))
def test_addresses_are_read_or_refused(text: str) -> None:
    """Any text gives an address with the same text (in lower case, if it is bech32), or a bad request."""
    for network in Network:
        script = refused_or(BadRequest, decode_address, text, network)

        assert script is None or encode_address(script, network) in (text, text.lower())


_HASHES, _LONG_HASHES = st.binary(min_size=20, max_size=20), st.binary(min_size=32, max_size=32)
_ADDRESS_SCRIPTS = (
    st.builds(b"\x76\xa9\x14%b\x88\xac".__mod__, _HASHES)
    | st.builds(b"\xa9\x14%b\x87".__mod__, _HASHES)
    | st.builds(b"\x00\x14%b".__mod__, _HASHES)
    | st.builds(b"\x00\x20%b".__mod__, _LONG_HASHES)
    | st.builds(b"\x51\x20%b".__mod__, _LONG_HASHES)
)


@given(_ADDRESS_SCRIPTS, st.sampled_from(Network))
def test_addresses_round_trip(script: bytes, network: Network) -> None:
    """Every hash has an address of each type on each network, which decodes to the same script."""
    address = encode_address(script, network)

    assert decode_address(address, network) == script
    if "1" in address[:5] and address.startswith(network.bech32_prefix):
        assert decode_address(address.upper(), network) == script


@given(_ADDRESS_SCRIPTS, st.sampled_from(Network), st.data())
def test_a_changed_address_is_refused(script: bytes, network: Network, data: st.DataObject) -> None:
    """One other character of the alphabet at any place gives no address of any network."""
    address = encode_address(script, network)
    at = data.draw(st.integers(0, len(address) - 1))
    other = data.draw(
        st.sampled_from("123456789qpzryxgf2tvdw0sjn54khcemua7lABCDEFGHJKLMNPQRSTUVWXYZ").filter(address[at].__ne__)
    )
    for each in Network:
        assert refused_or(BadRequest, decode_address, address[:at] + other + address[at + 1 :], each) is None


@given(st.integers(0, 16), st.binary(min_size=2, max_size=40), st.sampled_from(Network))
def test_every_witness_program_is_taken_or_refused_by_its_type(version: int, program: bytes, network: Network) -> None:
    """The addresses of other versions and lengths are refused, however valid their checksum is."""
    text = encode_program(network.bech32_prefix, version, program)
    script = refused_or(BadRequest, decode_address, text, network)

    if (version, len(program)) in ((0, 20), (0, 32), (1, 32)):
        assert script == witness_script(version, program)
        assert encode_address(script, network) == text
    else:
        assert script is None


@given(outpoints)
def test_outpoints_round_trip(outpoint: OutPoint) -> None:
    """A displayed outpoint is read back as the same outpoint."""
    assert OutPoint.parse(outpoint.txid_hex, outpoint.vout) == outpoint
    assert outpoint.reversed.reversed == outpoint


# --- records and frames ---------------------------------------------------------------------------------------------

SAMPLES = list(samples().values())


def sealed(body: bytes, seq: int) -> bytes:
    """Any body as a record with a correct head and checksum."""
    content = bytes([VERSION]) + seq.to_bytes(8, "big") + body
    return content + zlib.crc32(content).to_bytes(4, "big")


def spliced(draw: st.DrawFn, whole: bytes) -> bytes:
    """Bytes in which one part was replaced by other bytes."""
    start = draw(st.integers(0, len(whole)))
    end = draw(st.integers(start, min(start + 8, len(whole))))
    return whole[:start] + draw(st.binary(max_size=8)) + whole[end:]


@st.composite
def damaged_bodies(draw: st.DrawFn) -> tuple[bytes, int]:
    """A real record's body with one part replaced, and the sequence number of its head."""
    channel = draw(st.sampled_from(SAMPLES))
    return spliced(draw, encode_record(channel)[9:-4]), channel.seq


@given(st.binary(max_size=400))
def test_threat_12_any_bytes_are_damage(raw: bytes) -> None:
    """Random bytes are never read as a record."""
    assert refused_or(DamagedRecord, decode_record, raw) is None


@given(damaged_bodies() | st.tuples(st.binary(max_size=80), st.just(1)))
def test_threat_12_a_checksum_over_damage_does_not_help(damaged: tuple[bytes, int]) -> None:
    """A body damaged before its checksum was made gives a channel that can be written again, or `DamagedRecord`."""
    channel = refused_or(DamagedRecord, decode_record, sealed(*damaged))

    if channel is not None:
        assert decode_record(encode_record(channel)) == channel


@given(st.binary(max_size=300), st.recursive(st.integers() | st.binary() | st.text(), st.lists, max_leaves=8))
def test_frames_are_read_or_refused(raw: bytes, value: Any) -> None:
    """Any bytes from the signer's socket give a message or `WireError`."""
    for body in (
        raw,
        b"\x01" + raw,
        b"\x01" + msgpack(value),
        b"\x01" + msgpack([1, value]),
        b"\x01" + msgpack([value]),
    ):
        refused_or(WireError, decode_request, body)
        refused_or(WireError, decode_reply, body)


def msgpack(value: Any) -> bytes:
    """Encode a value; integers that are too large for msgpack become text."""
    try:
        return msgspec.msgpack.encode(value)
    except OverflowError:
        return msgspec.msgpack.encode(repr(value))


def refused_or(error: type[Exception], read: Any, *args: Any) -> Any:
    """Return the result of a reader, or None if it raises its own error; any other exception fails the test."""
    try:
        return read(*args)
    except error:
        return None
