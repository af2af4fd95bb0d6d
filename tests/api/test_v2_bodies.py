"""Threats 26, 27 and 40: hostile JSON, hex and numbers are a 4xx with a code, and change nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import httpx
import pytest

from paychan.protocol.wire.rbpcp import Dialect
from tests.api.both_paths import BOTH_PATHS
from tests.lib.looped import looped
from tests.lib.rbpcp import V2, Payer, refusal
from tests.lib.system import System

pytestmark = BOTH_PATHS


@pytest.fixture(scope="module")
def channel(system: System) -> Iterator[V2]:
    """One open channel for the whole module, which no test may change."""
    no_keepalive = httpx.Limits(max_keepalive_connections=0)  # refused requests delay and end their connection
    with httpx.Client(timeout=30, trust_env=False, limits=no_keepalive, verify=False) as http:
        v2 = V2(system.url, Payer(), http, Dialect.S)
        assert v2.open(v2.payer.payment(100_000)).status_code == 201
        before = system.channel(v2.payer.outpoint)
        yield v2
        assert system.channel(v2.payer.outpoint) == before


def _refused_everywhere(v2: V2, content: bytes, headers: dict[str, str] | None = None) -> set[tuple[int, str]]:
    """Send a body to pay, close and open; return status and code of each answer."""
    asks: list[Callable[..., httpx.Response]] = [v2.http.put, v2.http.put, v2.http.post]
    urls = [v2.resource(), v2.resource("/close"), v2.resource()]
    return {refusal(ask(url, content=content, headers=headers)) for ask, url in zip(asks, urls, strict=True)}


NOT_JSON_OBJECTS = {
    "nothing": b"",
    "spaces": b"  \n",
    "text": b"hello",
    "null": b"null",
    "true": b"true",
    "number": b"1",
    "string": b'"payment_data"',
    "list": b"[]",
    "list of a payment": b'[{"payment_data":{}}]',
    "unfinished": b'{"payment_data":',
    "two objects": b"{}{}",
    "trailing comma": b'{"a":1,}',
    "comment": b"{/**/}",
    "single quotes": b"{'a':1}",
    "NaN": b'{"payment_data":NaN}',
    "Infinity": b'{"a":-Infinity}',
    "byte order mark": b"\xef\xbb\xbf{}",
    "UTF-16": '{"payment_data":{}}'.encode("utf-16"),
    "UTF-32": '{"payment_data":{}}'.encode("utf-32-le"),
    "not UTF-8": b'{"a":"\xff"}',
    "lone surrogate": b'{"a":"\\ud800"}',
    "surrogate in UTF-8": b'{"a":"\xed\xa0\x80"}',
    "control character": b'{"a":"\n"}',
    "NUL": b'{"a":1}\x00',
    "deep lists": b'{"a":' + b"[" * 2000 + b"]" * 2000 + b"}",
    "deep objects": b'{"a":' * 650 + b"1" + b"}" * 650,
    "deep and open": b"[" * 4096,
    "deep payment": b'{"payment_data":' * 200 + b"1" + b"}" * 200,
    "long number": b'{"a":' + b"9" * 4080 + b"}",
    "long fraction": b'{"a":1e' + b"9" * 4080 + b"}",
    "empty object": b"{}",
    "null payment": b'{"payment_data":null}',
    "list as payment": b'{"payment_data":[]}',
    "form": b"payment_data=1&signature_data=00",
    "gzip": b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03",
}


@looped("kind", NOT_JSON_OBJECTS)
def test_a_body_that_is_no_payment_object_is_a_400(channel: V2, kind: str) -> None:
    """The parser refuses malformed JSON, other encodings, deep nesting and long numbers, with a code."""
    found = _refused_everywhere(channel, NOT_JSON_OBJECTS[kind])
    assert found <= {(400, "malformed"), (400, "missing")}


VALUES = {
    "change_value": [
        "null",
        "true",
        '"1000"',
        "1000.0",
        "1e3",
        "-1",
        "-0.0",
        "1_000",
        "+5",
        "0x10",
        "01",
        "٣",
        "[]",
        "{}",
        "2100000000000001",
        "9223372036854775808",
        "18446744073709551616",
        "9" * 3000,
        "-" + "9" * 3000,
        "1e400",
    ],
    "funding_vout": ["null", "true", '"0"', "0.0", "-1", "4294967296", "9" * 3000],
    "sighash_flag": [
        "null",
        "131",
        '""',
        '"8"',
        '"0x83"',
        '"8 3"',
        '" 83"',
        '"83\\n"',
        '"083"',
        '"8383"',
        '"AB"',
        '"٨٣"',
    ],
    "signature_data": ["null", "1", "[]", '""', '"0"', '"30"', '"zz"', '"' + "00" * 1500 + '"', '"' + "ff" * 73 + '"'],
    "funding_txid": ["null", "1", '""', '"00"', '"' + "0" * 63 + '"', '"' + "0" * 65 + '"', '"' + "AB" * 32 + '"'],
    "redeem_script": ["null", "1", '"0"', '"6 3"', '"zz"', '"' + "63" * 1500 + '"'],
    "change_address": ["null", "1", "[]"],
}


@looped(("name", "value"), [(name, value) for name, values in VALUES.items() for value in values])
def test_threat_27_40_a_value_of_another_type_is_a_400(channel: V2, name: str, value: str) -> None:
    """Numbers must be JSON integers in range, hex lower case of even length, text a string (threats 27 and 40)."""
    data = json.loads(channel.opening_body(channel.payer.payment(100_000)))
    text = json.dumps(data | {name: "@"}).replace('"@"', value)
    assert {status for status, _ in _refused_everywhere(channel, text.encode())} == {400}


@looped("spoil", [" {}", "{} ", "{}\\n", "\\u0000{}", "{:.40} {:.1}", "0x{}"])
def test_hex_with_other_characters_is_refused(channel: V2, spoil: str) -> None:
    """Spaces, newlines and prefixes that `bytes.fromhex` or `int` accepts are refused."""
    signature = channel.payer.payment(120_000).signature_with_flag.hex()
    body = json.dumps({"signature_data": "@", "change_value": 1000}).replace("@", spoil.format(signature, signature))
    assert _refused_everywhere(channel, body.encode()) == {(400, "malformed")}


@pytest.mark.parametrize(
    "body",
    [
        '{{"signature_data":"{s}","change_value":{c},"change_value":{c}}}',
        '{{"signature_data":"{s}","signature_data":"{s}","change_value":{c}}}',
        '{{"signature_data":"{s}","change_value":{c},"chang\\u0065_value":0}}',
        '{{"payment_data":{{"signature_data":"{s}","change_value":{c}}},"payment_data":{{}}}}',
        '{{"payment_data":{{"signature_data":"{s}","change_value":0,"change_value":{c}}}}}',
        '{{"payment_data":{{"signature_data":"{s}","change_value":{c}}},"application_data":"","application_data":"x"}}',
    ],
)
def test_a_key_given_twice_is_refused(channel: V2, body: str) -> None:
    """Parsers disagree about which of two equal keys counts, so they are refused, also when written with escapes."""
    payment = channel.payer.payment(120_000)
    content = body.format(s=payment.signature_with_flag.hex(), c=payment.change_sat)
    found = {code for _, code in _refused_everywhere(channel, content.encode())}
    assert found <= {"repeated", "malformed", "missing"}


def test_a_key_name_in_a_value_is_not_a_repeated_key(open_v2: V2) -> None:
    """A body with the name of a key inside a string value is accepted."""
    body = open_v2.body(open_v2.payer.payment(120_000), '"change_value" \\ "payment_data"')
    assert open_v2.http.put(open_v2.resource(), content=body).status_code == 200


def test_a_signature_and_a_flag_that_disagree_are_refused(channel: V2) -> None:
    """RBPCP §4.4: a flag byte and `sighash_flag` that are both present must be equal."""
    payment = channel.payer.payment(120_000)
    for signature, flag in (
        (payment.signature_with_flag.hex(), "82"),
        (payment.signature.hex() + "82", "83"),
        (payment.signature_with_flag.hex() + "83", "83"),
        (payment.signature.hex()[:-2], "83"),
    ):
        body = {"signature_data": signature, "change_value": payment.change_sat, "sighash_flag": flag}
        assert _refused_everywhere(channel, json.dumps(body).encode()) == {(400, "malformed")}


def test_a_body_over_the_limit_is_a_413(channel: V2) -> None:
    """A body of 4096 bytes is read, one of 4097 is refused with both numbers, chunked or not."""
    body = channel.body(channel.payer.payment(100_000))
    padded = body + b" " * (4096 - len(body))
    assert channel.http.put(channel.resource(), content=padded).status_code == 200
    for content in (padded + b" ", iter([padded, b" "])):
        answer = channel.http.put(channel.resource(), content=content)
        assert refusal(answer) == (413, "body_too_large")
        assert (answer.json()["got_bytes"], answer.json()["limit_bytes"]) == (4097, 4096)
