"""JSON of v2: both dialects, wrapped and bare, and every wrong type (RBPCP §4.2 to §4.4, threats 26 and 27)."""

from __future__ import annotations

import json
from typing import Any

import pytest

from paychan.protocol.errors import Malformed, Missing, Repeated
from paychan.protocol.payment import Payment
from paychan.protocol.types import MAX_MONEY_SAT, OutPoint, Sat
from paychan.protocol.wire.rbpcp import (
    ChannelStatus,
    Dialect,
    FundingInfo,
    PaymentResult,
    V2Payment,
    encode_json,
    opening_secret,
    payment_data,
    read_secret,
    read_v2_body,
)
from tests.lib.looped import looped

SIGNATURE = bytes.fromhex("3006020111020122")
PAYMENT = Payment(Sat(1000), SIGNATURE, 0x83)
TXID = "ab" * 31 + "01"
S_BODY: dict[str, Any] = {"signature_data": SIGNATURE.hex() + "83", "change_value": 1000}
A_BODY: dict[str, Any] = {"signature_data": SIGNATURE.hex(), "change_value": 1000, "sighash_flag": "83"}
FACTS: dict[str, Any] = {
    "redeem_script": "63ac",
    "funding_txid": TXID,
    "funding_vout": 7,
    "change_address": "mm9mm96b8bZRBacaAvY5MEeDd6HW46qFcY",
}


def read(body: Any) -> V2Payment:
    """Read a body given as Python values."""
    return read_v2_body(json.dumps(body).encode())


def read_value(text: str, key: str = "change_value") -> V2Payment:
    """Read a bare dialect-S body in which one key has this JSON text."""
    fields = {name: json.dumps(value) for name, value in {**S_BODY, **FACTS}.items()} | {key: text}
    return read_v2_body(("{" + ",".join(f'"{name}":{value}' for name, value in fields.items()) + "}").encode())


# --- accepted bodies ------------------------------------------------------------------------------------------------


@looped(("data", "dialect"), [(S_BODY, Dialect.S), (A_BODY, Dialect.A)])
def test_both_dialects_wrapped_and_bare(data: dict[str, Any], dialect: Dialect) -> None:
    """Both dialects, wrapped or bare, give the same payment, and the reader returns the dialect."""
    bare, wrapped = read(data), read({"payment_data": data, "application_data": "an order"})

    assert (bare.payment, bare.dialect, bare.application_data) == (PAYMENT, dialect, "")
    assert (wrapped.payment, wrapped.dialect, wrapped.application_data) == (PAYMENT, dialect, "an order")
    assert (bare.outpoint, bare.redeem_script, bare.change_address) == (None, None, None)


def test_facts_beside_the_payment() -> None:
    """An opening's other keys are read: script bytes, the outpoint in internal order, and the address as it is."""
    body = read({"payment_data": A_BODY | FACTS})

    assert body.redeem_script == b"\x63\xac"
    assert body.outpoint == OutPoint(bytes.fromhex(TXID)[::-1], 7)
    assert body.change_address == FACTS["change_address"]


def test_a_flag_given_twice_must_be_one_flag() -> None:
    """DER with its flag and the same `sighash_flag` is one payment in dialect A; another flag is refused."""
    data = S_BODY | {"sighash_flag": "83"}

    assert read(data).payment == PAYMENT
    assert read(data).dialect is Dialect.A
    with pytest.raises(Malformed, match="same flag"):
        read(data | {"sighash_flag": "82"})


def test_unknown_keys_are_ignored() -> None:
    """Unknown keys, such as those of later versions, are ignored at any level, with any value."""
    extra = {"later": [1.5, None, {"change_value": True}], "e": 1e300}

    assert read(S_BODY | extra).payment == PAYMENT
    assert read({"payment_data": S_BODY | extra, "application_data": ""} | extra).payment == PAYMENT


@looped("dialect", list(Dialect))
def test_the_clients_object_is_read_back(dialect: Dialect) -> None:
    """The object that the client library writes is read as the same payment, facts and dialect."""
    body = read_v2_body(encode_json(payment_data(PAYMENT, dialect, **FACTS)))

    assert (body.payment, body.dialect, body.outpoint) == (PAYMENT, dialect, OutPoint.parse(TXID, 7))


@looped("change", [0, 1, 2**32, MAX_MONEY_SAT - 1, MAX_MONEY_SAT])
def test_threat_40_amounts_up_to_all_bitcoins(change: int) -> None:
    """Every possible amount is read exactly."""
    assert read_value(str(change)).payment.change_sat == change


def test_threat_40_more_than_all_bitcoins_is_refused() -> None:
    """One satoshi above all bitcoins is refused, with both numbers."""
    with pytest.raises(Malformed, match=f"got {MAX_MONEY_SAT + 1} sat, want 0 to {MAX_MONEY_SAT} sat"):
        read_value(str(MAX_MONEY_SAT + 1))


# --- wrong types ----------------------------------------------------------------------------------------------------


@looped("key", ["change_value", "funding_vout"])
@looped(
    "text",
    [
        *("true", "false", "null", "1.0", "1.5", "1e3", "1E3", "-1", "-1.0", '"1"', "[1]", "{}", "1e400", "[]", '""'),
        *("2100000000000001", "18446744073709551616", "1" * 30, "9" * 5000),
        "-" + "9" * 5000,
    ],
    ids=lambda text: text[:20],
)
def test_threat_27_wrong_integers_are_refused(key: str, text: str) -> None:
    """A boolean, fraction, exponent, text, negative or huge number is refused, and the refusal names the key."""
    with pytest.raises(Malformed) as refusal:
        read_value(text, key)

    assert refusal.value.fields["field"] == key


@looped("text", ["01", "+1", "1_0", "0x10", "1.", ".5", "\u0661", "NaN", "Infinity", "-Infinity", "--1"])
def test_threat_27_numbers_that_json_does_not_have_are_refused(text: str) -> None:
    """Numbers that only Python allows, NaN and Infinity are refused, in known and unknown keys."""
    for key in ("change_value", "unknown"):
        with pytest.raises(Malformed) as refusal:
            read_value(text, key)

        assert refusal.value.fields["field"] == "body"


@looped("key", ["signature_data", "redeem_script", "funding_txid", "change_address", "sighash_flag"])
@looped("text", ["1", "true", "null", "[]", "{}", '["63"]'])
def test_threat_27_wrong_texts_are_refused(key: str, text: str) -> None:
    """A key for text accepts only text, and the refusal names the key."""
    with pytest.raises(Malformed) as refusal:
        read_value(text, key)

    assert refusal.value.fields["field"] == key


@looped("value", [None, 1, True, [], {}])
def test_application_data_is_a_text(value: Any) -> None:
    """A value that is no text is refused."""
    with pytest.raises(Malformed, match="application_data"):
        read({"payment_data": S_BODY, "application_data": value})


@looped("key", ["signature_data", "redeem_script", "sighash_flag"])
@looped("damage", [str.upper, lambda h: " " + h, lambda h: h + "\n", lambda h: h[:2] + " " + h[2:],
                                    lambda h: h[:-1], lambda h: "0x" + h, lambda h: h[:-1] + "\u0663",
                                    lambda h: h[:-1] + "g"])  # fmt: skip
def test_threat_27_hex_is_lower_case_and_bare(key: str, damage: Any) -> None:
    """Upper case, spaces, prefixes, odd lengths and foreign digits are refused; `bytes.fromhex` accepts some."""
    good = {"signature_data": "300602011102012a", "redeem_script": "63ac", "sighash_flag": "8a"}[key]

    with pytest.raises(Malformed, match=key):
        read({**A_BODY, **FACTS, key: damage(good)})


@looped("txid", ["", TXID[:-2], TXID + "00", TXID.upper(), " " + TXID[1:], TXID[:-1] + "\u0663"])
def test_threat_27_txid_is_64_lower_case_digits(txid: str) -> None:
    """A txid of another length or alphabet is refused."""
    with pytest.raises(Malformed, match="funding_txid"):
        read(S_BODY | FACTS | {"funding_txid": txid})


@looped("vout", [0, 1, 2**32 - 1])
def test_every_output_index_is_read(vout: int) -> None:
    """An index has 32 bits."""
    outpoint = read_value(str(vout), "funding_vout").outpoint

    assert outpoint is not None
    assert outpoint.vout == vout


def test_an_index_of_33_bits_is_refused() -> None:
    """2^32 is not wrapped to 0."""
    with pytest.raises(Malformed, match="got 4294967296, want 0 to 4294967295"):
        read_value(str(2**32), "funding_vout")


@looped("half", ["funding_txid", "funding_vout"])
def test_half_an_outpoint_is_refused(half: str) -> None:
    """For a txid without index, or an index without txid, the refusal names the missing key."""
    other = {"funding_txid": "funding_vout", "funding_vout": "funding_txid"}[half]

    with pytest.raises(Missing, match=other):
        read(S_BODY | {half: FACTS[half]})


# --- signature and flag ---------------------------------------------------------------------------------------------


@looped("flag", ["", "8", "830", "8383", "0x83", " 83", "zz"])
def test_a_sighash_flag_is_one_byte(flag: str) -> None:
    """The flag is one byte of hex."""
    with pytest.raises(Malformed, match="sighash_flag"):
        read(A_BODY | {"sighash_flag": flag})


@looped(
    "signature",
    ["", "30", "3006", SIGNATURE.hex(), SIGNATURE.hex() + "8383", SIGNATURE.hex()[:-2], "30ff" + "00" * 20, "83"],
)
def test_dialect_s_wants_der_and_one_byte(signature: str) -> None:
    """Without `sighash_flag` exactly one byte follows the DER length."""
    with pytest.raises(Malformed, match="signature_data"):
        read(S_BODY | {"signature_data": signature})


@looped("signature", ["", "30", "3006", SIGNATURE.hex() + "8383", SIGNATURE.hex()[:-2], "30ff00"])
def test_dialect_a_wants_der_or_der_and_the_flag(signature: str) -> None:
    """With `sighash_flag` the signature is DER, or DER and that flag."""
    with pytest.raises(Malformed, match="signature_data"):
        read(A_BODY | {"signature_data": signature})


def test_a_signature_longer_than_any_is_refused() -> None:
    """73 bytes of DER are refused in either dialect, even if the length byte agrees."""
    with pytest.raises(Malformed, match="got 73 bytes, want 8 to 72"):
        read(A_BODY | {"signature_data": "3047" + "00" * 71})


# --- JSON itself ----------------------------------------------------------------------------------------------------


@looped("key", ["signature_data", "change_value"])
def test_missing_keys_are_named(key: str) -> None:
    """For a payment without signature or change value the refusal names the key, wrapped or bare."""
    data = {name: value for name, value in S_BODY.items() if name != key}

    for body in (data, {"payment_data": data}):
        with pytest.raises(Missing) as refusal:
            read(body)
        assert refusal.value.fields == {"field": key}


@looped(
    "body",
    [
        b"", b" ", b"null", b"[]", b'""', b"1", b"{", b"{}}", b"{'a':1}", b'{"a":1,}', b'{"a" 1}', b"\x00",
        b"\xef\xbb\xbf" + json.dumps(S_BODY).encode(),
        json.dumps(S_BODY).encode("utf-16"),
        json.dumps(S_BODY).encode() + b" x",
        json.dumps(S_BODY).encode() + json.dumps(S_BODY).encode(),
        b'{"signature_data":"","change_value":1,"application_data":"\xff"}',
        b'{"application_data":"\xc0\xaf"}',
        b'{"application_data":"\\ud800"}',
        b'{"application_data":"\xed\xa0\x80"}',
        b'{"payment_data":[]}', b'{"payment_data":null}', b'{"payment_data":"x"}',
        b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"x":' + b'{"x":' * 100_000,
        b"[" * 100_000,
    ],
    ids=lambda body: ascii(body[:24]),
)  # fmt: skip
def test_threat_26_bodies_that_are_no_json_object_are_refused(body: bytes) -> None:
    """Broken, deep, doubled or wrongly encoded JSON is malformed: no crash, no partial result."""
    with pytest.raises(Malformed):
        read_v2_body(body)


@looped("name", [*S_BODY, *FACTS, "sighash_flag", "payment_data", "application_data"])
@looped("escape", [False, True], ids=["plain", "escaped"])
def test_threat_27_repeated_keys_are_refused(name: str, escape: bool) -> None:
    r"""A repeated key, also as `\u0063hange_value`, is refused: parsers disagree on which value counts."""
    texts = {key: json.dumps(value) for key, value in {**A_BODY, **FACTS}.items()}
    texts |= {"payment_data": json.dumps(A_BODY), "application_data": '"x"'}
    second = f"\\u{ord(name[0]):04x}{name[1:]}" if escape else name
    if name in {"payment_data", "application_data"}:
        body = f'{{"payment_data":{texts["payment_data"]},"{second}":{texts[name]},"application_data":"x"}}'
    else:
        inner = ",".join(f'"{key}":{texts[key]}' for key in {**A_BODY, **FACTS})
        body = f'{{"payment_data":{{{inner},"{second}":{texts[name]}}}}}'

    with pytest.raises(Repeated) as refusal:
        read_v2_body(body.encode())

    assert refusal.value.fields == {"field": name}


def test_one_name_at_two_levels_is_no_repetition() -> None:
    """Wrapper and unknown objects may contain the payment's names; only the keys of one object must differ."""
    body = {"payment_data": S_BODY | {"x": dict(S_BODY)}, "application_data": '"change_value":"change_value"'}

    assert read(body).payment == PAYMENT


def test_escapes_alone_are_no_repetition() -> None:
    """A body with escapes goes through the slow parser and is accepted."""
    body = json.dumps({"payment_data": S_BODY, "application_data": '\\"\n\u20ac'})

    assert read_v2_body(body.encode()).application_data == '\\"\n\u20ac'


# --- secrets --------------------------------------------------------------------------------------------------------


@looped("write", [str, str.upper, '"{}"'.format, lambda text: f'"{text.upper()}"'])
def test_secret_in_every_known_spelling(write: Any) -> None:
    """Plain, in upper case, and in JSON quotes it is the same secret."""
    secret = opening_secret(PAYMENT)

    assert read_secret(write(secret.hex())) == secret


@looped(
    "text",
    [
        "",
        '"',
        '""',
        "0" * 63,
        "0" * 65,
        "0" * 66,
        '"' + "0" * 64,
        "0" * 64 + '"',
        '""' + "0" * 64 + '""',
        " " + "0" * 64,
        "0" * 64 + "\n",
        "g" + "0" * 63,
        "0x" + "0" * 62,
        "0 " * 32,
        "\u0660" * 64,
        "\uff10" * 64,
        "0" * 63 + "\u212a",
    ],
)
def test_threat_27_other_texts_are_no_secret(text: str) -> None:
    """Other texts give None and raise no error."""
    assert read_secret(text) is None


# --- answers --------------------------------------------------------------------------------------------------------


@looped(("txid", "want"), [(None, "null"), ("", '""'), ("ab", '"ab"')])
def test_payment_result_of_v1_and_v2(txid: str | None, want: str) -> None:
    """A result has exactly the documented keys; v2 adds `application_data`, even if it is empty."""
    v1 = PaymentResult(ChannelStatus.OPEN, Sat(5), Sat(6), txid)
    v2 = PaymentResult(ChannelStatus.CLOSED, Sat(0), Sat(0), txid, "")

    assert encode_json(v1).decode() == (
        f'{{"channel_status":"open","channel_value_left":5,"value_received":6,"settlement_txid":{want}}}'
    )
    assert json.loads(encode_json(v2)) == {
        "channel_status": "closed",
        "channel_value_left": 0,
        "value_received": 0,
        "settlement_txid": txid,
        "application_data": "",
    }


def test_funding_info_of_v1_and_v2() -> None:
    """v1 has five keys; v2 has the two more that its document lists."""
    v1 = FundingInfo("02aa", "2Nx", Sat(0), 0, 6)
    v2 = FundingInfo("02aa", "2Nx", Sat(0), 0, 6, Sat(700), 12)

    assert json.loads(encode_json(v1)) == {
        "server_pubkey": "02aa",
        "funding_address_copy": "2Nx",
        "open_price": 0,
        "funding_tx_min_conf": 0,
        "settlement_period_hours": 6,
    }
    assert json.loads(encode_json(v2)) == json.loads(encode_json(v1)) | {"dust_limit": 700, "min_duration_hours": 12}
