"""MPP: challenges, credentials, receipts and problems against frozen vectors, the SDK's bytes, and broken input."""

from __future__ import annotations

import base64
import json
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from paychan.protocol.errors import PaychanError, UnknownChannel
from paychan.protocol.types import Sat, UnixTime
from paychan.protocol.unpaid import (
    ChallengeExpired,
    CreditTooLow,
    InvalidChallenge,
    MalformedPayment,
    OfferMismatch,
    PaymentTooLarge,
    PaymentUnsupported,
)
from paychan.protocol.wire import mpp, mpp_outcomes
from paychan.protocol.wire.canonical import (
    canonical_json,
    from_base64,
    from_base64url,
    json_object,
    read_time,
    time_text,
    to_base64,
    to_base64url,
)
from paychan.protocol.wire.challenge_header import MAX_BYTES, quoted, read_challenges, unquoted
from paychan.protocol.wire.mpp_challenge import Challenge, challenge_header, challenge_id, challenge_json, challenges
from paychan.protocol.wire.offers import ChannelState, Offer, Settled, Voucher
from tests.lib import paidvectors as vectors
from tests.lib.looped import looped
from tests.lib.vectors import read_vectors
from tests.protocol.test_x402_wire import OTHER_TERMS, actions, offers, sats, states, values

VALID, INVALID, SDK = (read_vectors(f"mpp/{name}.json") for name in ("valid", "invalid", "sdk"))

header_texts = st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1, max_size=30)


# --- vectors ------------------------------------------------------------------------------------------------------------


@looped("case", VALID["cases"], ids=lambda case: case["name"])
def test_a_valid_header_has_its_meaning(case: dict[str, Any]) -> None:
    """The value is read as the vector says."""
    assert vectors.judge_mpp(case["header"], case["value"]) == case["meaning"]


@looped("case", INVALID["cases"], ids=lambda case: case["name"])
def test_an_invalid_header_has_its_code(case: dict[str, Any]) -> None:
    """The value is refused by the code that the vector names."""
    assert case["code"] in {*PaychanError.table, "another scheme"}
    assert vectors.judge_mpp(case["header"], case["value"]) == case["code"]


def test_the_id_of_a_challenge_is_that_of_the_sdks() -> None:
    """The keyed hash and the canonical request of pympp for one challenge, byte by byte."""
    request = {
        "amount": "25",
        "currency": "sat",
        "methodDetails": {
            "payUrl": "http://127.0.0.1:8000",
            "network": "regtest",
            "chain": "bip122:0f9188f13cb7b2c71f2a335e3a4fc328",
        },
        "unitType": "request",
        "recipient": "0279be667ef9dcbbac55a06295ce870b07029bfcdb2dce28d959f2815b16f81798",
    }
    text = to_base64url(canonical_json(request))
    unsigned = Challenge("", "api.example", "bitcoin", "session", text, "2026-12-01T12:00:00Z")

    assert text == (
        "eyJhbW91bnQiOiIyNSIsImN1cnJlbmN5Ijoic2F0IiwibWV0aG9kRGV0YWlscyI6eyJjaGFpbiI6ImJpcDEyMjowZjkxODhmMTNjYjdiMmM3"
        "MWYyYTMzNWUzYTRmYzMyOCIsIm5ldHdvcmsiOiJyZWd0ZXN0IiwicGF5VXJsIjoiaHR0cDovLzEyNy4wLjAuMTo4MDAwIn0sInJlY2lwaWVu"
        "dCI6IjAyNzliZTY2N2VmOWRjYmJhYzU1YTA2Mjk1Y2U4NzBiMDcwMjliZmNkYjJkY2UyOGQ5NTlmMjgxNWIxNmY4MTc5OCIsInVuaXRUeXBl"
        "IjoicmVxdWVzdCJ9"
    )
    assert challenge_id(unsigned, b"paychan-vector-secret") == "_rXAZWZIx54sZBpgiMFfa6L9G_ZhEXM5RNMvnErP8-4"


def test_a_challenge_of_the_sdk_is_read() -> None:
    """Quotes, backslashes, commas and characters beyond ASCII survive; the id covers header and opaque as the SDK has it."""
    (found,) = challenges([SDK["WWW-Authenticate"]])

    assert (found.realm, found.description) == ('a "q", Payment id=1 \\ ü😀', 'x "y" \\ é 😀')
    assert (found.header, found.opaque) == ("Payment-Authorization", to_base64url(b'{"a":"b"}'))
    assert challenge_id(found, vectors.SECRET) == found.id
    assert challenges([challenge_header(found)]) == [found]


def test_a_credential_and_a_receipt_of_the_sdk_are_read() -> None:
    """The SDK writes other bytes; both are read."""
    meanings = {case["name"]: case["meaning"] for case in VALID["cases"]}

    assert vectors.judge_mpp("Authorization", SDK["Authorization"]) == meanings["a voucher"] | {
        "source": "did:key:z6Mk"
    }
    assert vectors.judge_mpp("Payment-Receipt", SDK["Payment-Receipt"]) == meanings["a receipt"]


# --- canonical texts ------------------------------------------------------------------------------------------------------


def test_keys_are_in_the_order_of_rfc_8785() -> None:
    """The example of RFC 8785, 3.2.3: keys are sorted by UTF-16 units, not by code points."""
    keys = ["\u20ac", "\r", "\ufb33", "1", "\U0001f600", "\x80", "\xf6"]
    want = ["\r", "1", "\x80", "\xf6", "\u20ac", "\U0001f600", "\ufb33"]

    assert list(json.loads(canonical_json({key: [{}] for key in keys}))) == want


def test_strings_are_escaped_as_rfc_8785_says() -> None:
    """RFC 8785, 3.2.2.2: two-character escapes where JSON has them, lower-case hex for the other controls, UTF-8."""
    assert canonical_json('€$\x0f\nA\'B"\\\\"/\x7f\u2028\b\t\f\r') == (
        '"€$\\u000f\\nA\'B\\"\\\\\\\\\\"/\x7f\u2028\\b\\t\\f\\r"'.encode()
    )


@given(values)
def test_canonical_json_is_json(value: Any) -> None:
    """A value with a canonical form is read again as the same value; the order of its keys does not change the form."""
    try:
        text = canonical_json(value)
    except ValueError:
        assert any(
            isinstance(item, float) or (isinstance(item, int) and abs(item) > 2**53 - 1) for item in leaves(value)
        )
        return
    assert json.loads(text) == value
    assert canonical_json(turned(value)) == text
    assert b" " not in text or " " in str(value)


def leaves(value: Any) -> list[Any]:
    """Return every value that is no object and no array."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return [value] if inner is None else [leaf for item in inner for leaf in leaves(item)]


def turned(value: Any) -> Any:
    """Return the value with the keys of every object in the opposite order."""
    if isinstance(value, dict):
        return {key: turned(item) for key, item in reversed(value.items())}
    return [turned(item) for item in value] if isinstance(value, list) else value


@looped(
    "value", [0.0, float("nan"), 2**53, -(2**53), {1: 2}, {"a": 1.5}, [object()], "\ud800", {"\udfff": 1}, b"a", {1, 2}]
)
def test_values_without_a_canonical_form_are_refused(value: Any) -> None:
    """Floats, integers that other parsers round, lone surrogates and other types."""
    with pytest.raises(ValueError, match=r"no canonical form|no text|surrogates not allowed"):
        canonical_json(value)


def test_deep_objects_have_no_canonical_form() -> None:
    """Nesting is limited, so that no value can exhaust the stack."""
    value: Any = 1
    for _ in range(16):
        value = [value]

    assert canonical_json(value) == b"[" * 16 + b"1" + b"]" * 16
    with pytest.raises(ValueError, match="deeper"):
        canonical_json([value])


@given(st.binary(max_size=80))
def test_base64_comes_back(raw: bytes) -> None:
    """The text is that of the standard library with padding; every other spelling of it is refused."""
    text = to_base64(raw)

    assert text == base64.b64encode(raw).decode()
    assert from_base64(text, "x", 200) == raw
    for other in {text + "=", text.rstrip("="), " " + text, text.replace("+", "-"), text.replace("/", "_")} - {text}:
        with pytest.raises(MalformedPayment):
            from_base64(other, "x", 200)


@looped("text", ["e31=", "e3==", "e", "e3=", "e30=e30=", "é"])
def test_loose_base64_is_refused(text: str) -> None:
    """Bits after the end, a lone character, wrong padding, padding inside."""
    with pytest.raises(MalformedPayment, match="base64"):
        from_base64(text, "x", 200)
    with pytest.raises(MalformedPayment, match="base64"):
        from_base64url(text, "x", 200)


@given(st.binary(max_size=80))
def test_base64url_comes_back(raw: bytes) -> None:
    """The text is that of the standard library without padding; every other spelling of it is refused."""
    text = to_base64url(raw)

    assert text == base64.urlsafe_b64encode(raw).decode().rstrip("=")
    assert from_base64url(text, "x", 200) == raw
    for other in {text + "=", " " + text, text + "\n", text.replace("-", "+"), text.replace("_", "/")} - {text}:
        with pytest.raises(MalformedPayment):
            from_base64url(other, "x", 200)


@looped("text", ['{"a":1e999}', '{"a":1' + "0" * 5000 + "}", "\ufeff{}", '{"a\\u0062":1,"ab":2}', "{} {}", "null"])
def test_json_with_two_readings_is_refused(text: str) -> None:
    """Numbers that parsers round to infinity, a byte order mark, equal keys in two spellings, two values."""
    with pytest.raises(MalformedPayment, match="not a JSON object"):
        json_object(text.encode(), "x")


def test_large_integers_are_read_exactly() -> None:
    """An integer beyond 64 bits is no float and no crash."""
    assert json_object(b'{"a":1180591620717411303424}', "x") == {"a": 2**70}


@given(st.integers(0, 253402300799).map(UnixTime))
@example(UnixTime(951782400))  # 2000-02-29
@example(UnixTime(4107542399))  # 2100-02-28T23:59:59, before a day that is no 29 February
def test_times_are_those_of_the_calendar(time: UnixTime) -> None:
    """A time is written as Python's own calendar does, and read again."""
    text = datetime.fromtimestamp(time, UTC).strftime("%Y-%m-%dT%H:%M:%SZ").rjust(20, "0")

    assert time_text(time) == text
    assert read_time(text, "expires") == time


@looped(
    ("text", "time"),
    [
        ("2026-12-01T12:00:00Z", 1796126400),
        ("2026-12-01t12:00:00.999z", 1796126400),
        ("2026-12-01T13:30:00+01:30", 1796126400),
        ("2026-12-01T00:00:00-12:00", 1796126400),
        ("2016-12-31T23:59:60Z", 1483228800),
    ],
)
def test_forms_of_a_time(text: str, time: int) -> None:
    """Fractions, offsets, lower case and a leap second are read."""
    assert read_time(text, "expires") == time


@looped(
    "text",
    ["", "2026-12-01", "2026-12-01T12:00:00", "2026-12-01 12:00:00Z", "2026-13-01T00:00:00Z", "2026-00-01T00:00:00Z",
     "2026-02-29T00:00:00Z", "2100-02-29T00:00:00Z", "2026-12-00T00:00:00Z", "2026-12-01T24:00:00Z",
     "2026-12-01T12:60:00Z", "2026-12-01T12:00:61Z", "2026-12-01T12:00:00.Z", "2026-12-01T12:00:00+24:00",
     "\uff12026-12-01T12:00:00Z", "2026-12-01T12:00:00Z\n"],
)  # fmt: skip
def test_what_is_no_time_is_refused(text: str) -> None:
    """Every part is in its range, and the text has no other form."""
    with pytest.raises(MalformedPayment, match="RFC 3339"):
        read_time(text, "expires")


# --- challenges -----------------------------------------------------------------------------------------------------------


@given(header_texts)
def test_a_quoted_string_comes_back(text: str) -> None:
    """A quoted string is ASCII, and is read again as the same text."""
    shown = quoted(text)

    assert shown.isascii()
    assert unquoted(shown[1:-1]) == text


def test_a_control_character_is_not_written() -> None:
    """A line break in a realm can't begin a header of its own; in a description it becomes a space."""
    for realm in ("a\r\nSet-Cookie: b", "a|b", ""):
        with pytest.raises(ValueError, match="realm"):
            mpp.challenge(msgspec.structs.replace(vectors.OFFER, realm=realm), vectors.SECRET, vectors.EXPIRES)
    with pytest.raises(ValueError, match="control"):
        quoted("a\n")

    odd = msgspec.structs.replace(vectors.OFFER, description="a\r\nb\tc")
    assert mpp.challenge(odd, vectors.SECRET, vectors.EXPIRES).description == "a b c"


def test_a_lone_surrogate_becomes_a_mark() -> None:
    """Escapes that are no text do not stop the parser."""
    assert unquoted(r"a\ud83d b\udc00") == "a\ufffd b\ufffd"


@given(st.lists(offers, min_size=1, max_size=3), st.booleans())
def test_challenges_come_back_from_one_field_or_several(several: list[Offer], join: bool) -> None:
    """Browsers join fields by a comma and a space; the offers are found either way, beside other schemes."""
    offered = [plain(offer) for offer in several]
    made = [mpp.challenge(offer, vectors.SECRET, vectors.EXPIRES) for offer in offered]
    fields = [
        'Basic realm="Payment id=\\"x\\", a"',
        *map(challenge_header, made),
        "Negotiate",
        "NTLM TlRMTVNT==",
        'Digest a=b , c="d"',
    ]

    found = mpp.offers([", ".join(fields)] if join else fields)

    assert [each.challenge for each in found] == made
    assert [each.offer for each in found] == offered


def plain(offer: Offer) -> Offer:
    """Return the offer without characters that no challenge holds."""
    realm, description = (
        "".join(c for c in text if c.isprintable() and c != "|") for text in (offer.realm, offer.description)
    )
    return msgspec.structs.replace(offer, realm=realm or "r", description=description)


@looped(
    ("text", "want"),
    [
        ("", []),
        (" , ,", []),
        ("Bearer", [("bearer", {})]),
        ("bearer,  Basic", [("bearer", {}), ("basic", {})]),
        ("Negotiate YWJj==, A b=c", [("negotiate", {}), ("a", {"b": "c"})]),
        ('A b = "c" ,d=e', [("a", {"b": "c", "d": "e"})]),
        ('A b="c, D e=\\"f\\"", G h=i', [("a", {"b": 'c, D e="f"'}), ("g", {"h": "i"})]),
        ('A b=""', [("a", {"b": ""})]),
        ("PAYMENT Id=1, B", [("payment", {"id": "1"}), ("b", {})]),
    ],
)
def test_challenges_are_split_by_scheme(text: str, want: list[Any]) -> None:
    """A comma is between parameters, between challenges, or inside a quoted string."""
    assert read_challenges([text]) == want


@looped("text", ['A b="c', "=", 'A b="c" d', "A b=c d=e", '"A"', 'A b="c"; d=e', "A b=c, b=d", "é"])
def test_other_texts_are_no_challenges(text: str) -> None:
    """A text that no grammar of challenges has is refused as a whole."""
    with pytest.raises(MalformedPayment, match="WWW-Authenticate"):
        read_challenges([text])


def test_a_field_that_is_too_long_is_not_read() -> None:
    """All fields together have one limit."""
    with pytest.raises(PaymentTooLarge, match=f"limit {MAX_BYTES} bytes"):
        read_challenges(["A " * 20_000, "B " * 20_000])


@given(st.text(st.sampled_from('aA =",\\ \tu0d8é;é'), max_size=40))
def test_any_field_is_read_or_refused(text: str) -> None:
    """Any text is read or refused; nothing else is raised."""
    try:
        assert all(isinstance(scheme, str) for scheme, _ in read_challenges([text]))
    except MalformedPayment as error:
        assert error.fields["field"] == "WWW-Authenticate"  # noqa: PT017 - either way is right


@looped(
    ("change", "refusal"),
    [
        ({"currency": "usd"}, PaymentUnsupported),
        ({"unitType": "hour"}, PaymentUnsupported),
        ({"amount": 25}, MalformedPayment),
        ({"recipient": "02" + "00" * 32}, MalformedPayment),
        ({"methodDetails": None}, MalformedPayment),
        (
            {"methodDetails": {"chain": "bip122:0f9188f13cb7b2c71f2a335e3a4fc328", "network": "mainnet"}},
            PaymentUnsupported,
        ),
        ({"suggestedDeposit": "-1"}, MalformedPayment),
    ],
)
def test_an_offer_of_another_form_is_left_out(change: dict[str, Any], refusal: type[PaychanError]) -> None:
    """A payer skips a challenge that this method can't pay, and sees why when it asks."""
    request = to_base64url(canonical_json(mpp.request_json(vectors.OFFER) | change))
    odd = Challenge("i", "r", "bitcoin", "session", request)

    with pytest.raises(refusal):
        mpp.offer_of(odd)
    assert mpp.offers([challenge_header(odd)]) == []


# --- credentials ------------------------------------------------------------------------------------------------------------


@given(offers, actions, st.none() | states(), st.none() | st.text(max_size=30))
def test_a_credential_comes_back(offer: Offer, action: Any, state: ChannelState | None, source: str | None) -> None:
    """A server reads what a payer wrote for its challenge, which holds until its last second."""
    made = mpp.challenge(plain(offer), vectors.SECRET, vectors.EXPIRES, state=state)
    credential = mpp.read_credential(mpp.credential_header(made, action, source))

    assert credential is not None
    assert (credential.challenge, credential.source) == (made, source)
    assert mpp.action_of(credential.payload) == action
    assert mpp.challenge_problem(credential, plain(offer), [vectors.SECRET], vectors.EXPIRES) is None


@given(offers, actions)
def test_a_credential_of_json_rpc_comes_back(offer: Offer, action: Voucher) -> None:
    """In JSON-RPC the request is an object; the server writes it canonically again and finds its own hash."""
    made = mpp.challenge(plain(offer), vectors.SECRET, vectors.EXPIRES)
    shown = json.loads(json.dumps({"challenge": challenge_json(made), "payload": mpp.payload_of(action)}))

    credential = mpp.credential_of(shown)

    assert credential.challenge == made
    assert mpp.challenge_problem(credential, plain(offer), [vectors.SECRET], vectors.EXPIRES) is None


def problem(credential_header: str, *, now: int = vectors.EXPIRES, digest: str | None = None) -> PaychanError | None:
    """Return why the server refuses the challenge of a credential for the vectors' offer."""
    credential = mpp.read_credential(credential_header)
    assert credential is not None
    secrets = [vectors.SECRET, vectors.OLD_SECRET]
    return mpp.challenge_problem(credential, vectors.OFFER, secrets, UnixTime(now), digest)


def test_both_secrets_hold_and_no_other() -> None:
    """During a rotation challenges of the old secret are accepted, too."""
    for secret, refused in ((vectors.SECRET, False), (vectors.OLD_SECRET, False), (b"", True), (b"x", True)):
        made = mpp.challenge(vectors.OFFER, secret, vectors.EXPIRES)
        assert isinstance(problem(mpp.credential_header(made, vectors.FIRST)), InvalidChallenge) is refused


def test_without_a_secret_no_challenge_holds() -> None:
    """A server without secrets accepts nothing."""
    credential = mpp.read_credential(
        mpp.credential_header(mpp.challenge(vectors.OFFER, b"", vectors.EXPIRES), vectors.FIRST)
    )

    assert credential is not None
    assert mpp.challenge_problem(credential, vectors.OFFER, [], vectors.EXPIRES) == InvalidChallenge()


def test_a_challenge_ends_after_its_last_second() -> None:
    """The refusal has both times."""
    header = mpp.credential_header(mpp.challenge(vectors.OFFER, vectors.SECRET, vectors.EXPIRES), vectors.FIRST)
    late = UnixTime(vectors.EXPIRES + 1)

    assert problem(header) is None
    assert problem(header, now=late) == ChallengeExpired(now_unix=late, limit_unix=vectors.EXPIRES)


def test_a_digest_binds_the_challenge_to_a_body() -> None:
    """A challenge with a digest holds for a request with this body alone."""
    made = mpp.challenge(vectors.OFFER, vectors.SECRET, vectors.EXPIRES, digest="sha-256=:YQ==:")
    header = mpp.credential_header(made, vectors.FIRST)

    assert problem(header, digest="sha-256=:YQ==:") is None
    assert isinstance(problem(header, digest="sha-256=:Yg==:"), OfferMismatch)
    assert isinstance(problem(header), OfferMismatch)


@looped("change", OTHER_TERMS, ids=lambda change: next(iter(change)))
def test_a_challenge_for_other_terms_is_refused(change: dict[str, Any]) -> None:
    """A challenge that this server has signed is refused as soon as one term of the offer is another."""
    header = vectors.signed(msgspec.structs.replace(vectors.OFFER, **change))
    refusal = problem(header)

    assert isinstance(refusal, OfferMismatch) is (change.keys() != {"suggested_deposit_sat"})


def test_members_that_sdks_add_to_a_request_are_taken() -> None:
    """A challenge with more members than the offer, signed by this server, holds."""
    request = mpp.request_json(vectors.OFFER) | {"_mppx_scope": "GET /v1/tile"}

    assert problem(vectors.signed(vectors.OFFER, request=to_base64url(canonical_json(request)))) is None


def test_a_bar_moves_no_text_between_members() -> None:
    """The hash joins members by a bar: other members with a bar inside can have the same hash, and are refused."""
    header = "Payment-Authorization"
    made = mpp.challenge(vectors.OFFER, vectors.SECRET, vectors.EXPIRES, digest="sha-256=:YQ==:", header=header)
    moved = msgspec.structs.replace(made, digest=f"{made.digest}|{header}", header=None)

    assert challenge_id(moved, vectors.SECRET) == made.id
    assert problem(mpp.credential_header(moved, vectors.FIRST), digest=moved.digest) == InvalidChallenge()
    for name in ("realm", "expires", "digest", "opaque", "header"):
        assert problem(vectors.signed(vectors.OFFER, **{name: "a|b"})) == InvalidChallenge()


@looped("header", ["", "Bearer x", "Basic Payment", "PaymentX a", "Payments e30"])
def test_another_scheme_is_no_credential(header: str) -> None:
    """The upstream's own credentials are not for this server."""
    assert mpp.read_credential(header) is None


def test_the_scheme_has_no_case() -> None:
    """RFC 9110, 11.1: the scheme is compared without case."""
    header = mpp.credential_header(mpp.challenge(vectors.OFFER, vectors.SECRET, vectors.EXPIRES), vectors.FIRST)

    assert mpp.read_credential(header.replace("Payment", "pAYMENT")) == mpp.read_credential(header)


def test_a_credential_that_is_too_long_is_not_decoded() -> None:
    """The refusal has both numbers."""
    with pytest.raises(PaymentTooLarge, match=f"got 30000 bytes, limit {mpp.MAX_CREDENTIAL_BYTES} bytes"):
        mpp.read_credential("Payment " + "a" * 30_000)


def test_the_longest_opening_fits() -> None:
    """An opening with the longest transaction, for a challenge that names a channel, is within the limit."""
    opening = vectors.ACTIONS["an opening with its funding transaction"]
    long = msgspec.structs.replace(opening, funding_tx=b"\0" * 4000)
    made = mpp.challenge(vectors.OFFER, vectors.SECRET, vectors.EXPIRES, state=vectors.STATE)

    credential = mpp.read_credential(mpp.credential_header(made, long))

    assert credential is not None
    assert mpp.action_of(credential.payload) == long


def test_top_up_is_refused_with_a_way_out() -> None:
    """A channel has one funding output: the refusal says which actions there are."""
    payload = mpp.payload_of(vectors.FIRST) | {"action": "topUp", "additionalDeposit": "1000"}

    with pytest.raises(
        PaymentUnsupported, match="action topUp is not supported, want open, voucher or close"
    ) as caught:
        mpp.action_of(payload)
    assert caught.value.http_status == 400


@given(st.dictionaries(st.sampled_from(["challenge", "payload", "source"]), values))
def test_any_credential_is_read_or_refused(value: dict[str, Any]) -> None:
    """Any JSON in place of a credential is refused."""
    with pytest.raises(MalformedPayment):
        mpp.credential_of(value)


# --- outcomes ---------------------------------------------------------------------------------------------------------------


@given(states(proven=False), sats, st.integers(0, 253402300799).map(UnixTime))
def test_a_receipt_comes_back(state: ChannelState, charged_sat: Sat, time: UnixTime) -> None:
    """A payer reads from the header what the server charged, and the channel after it."""
    receipt = mpp_outcomes.Receipt(Settled(state, charged_sat), "challenge", time)

    assert mpp_outcomes.read_receipt(mpp_outcomes.receipt_header(receipt)) == receipt


@given(states())
def test_a_snapshot_comes_back(state: ChannelState) -> None:
    """A payer that is behind reads the channel, and the proof if there is one, from the challenge."""
    made = mpp.challenge(vectors.OFFER, vectors.SECRET, vectors.EXPIRES, state=state)

    assert [each.state for each in mpp.offers([challenge_header(made)])] == [state]


def test_a_receipt_shows_no_signature() -> None:
    """The payer of the request has its own payment; a receipt that is passed on proves no payment to others."""
    shown = json.dumps(
        mpp_outcomes.receipt_json(mpp_outcomes.Receipt(Settled(vectors.STATE, Sat(1)), "c", UnixTime(0)))
    )

    assert vectors.STATE.newest is not None
    assert vectors.STATE.newest.signature.hex() not in shown


@looped(("needed_sat", "required"), [(10, "50"), (11, "51"), (0, "50"), (1000, "1040")])
def test_a_stream_asks_for_what_is_missing(needed_sat: int, required: str) -> None:
    """With a credit of 10 sat, the next unit needs its price less 10 sat."""
    event = mpp_outcomes.need_voucher_json(vectors.STATE, Sat(needed_sat))

    assert (event["requiredCumulative"], event["acceptedCumulative"], event["deposit"]) == (required, "50", "100000")


def test_a_problem_names_its_type_and_code() -> None:
    """Without a payment the problem says that one is needed; credit that is too low says how much is missing."""
    unpaid = mpp_outcomes.problem_json(402, "c", more={"amount": "25"})
    low = mpp_outcomes.problem_json(402, "c", CreditTooLow(got_sat=10, need_sat=25))
    unknown = mpp_outcomes.problem_json(402, "c", UnknownChannel())

    assert unpaid["type"] == "https://paymentauth.org/problems/payment-required"
    assert (unpaid["title"], unpaid["status"], unpaid["challengeId"]) == ("Payment required", 402, "c")
    assert (unpaid["amount"], "code" in unpaid) == ("25", False)
    assert (low["type"].rpartition("problems/")[2], low["requiredTopUp"]) == ("session/insufficient-balance", "15")
    assert (unknown["title"], unknown["code"]) == ("Channel not found", "unknown_channel")


def test_every_refusal_has_a_problem_type() -> None:
    """Types belong to refusals of this project; the others are a failed verification, without the server's inside."""
    inside = mpp_outcomes.problem_json(503, "c", PaychanError.table["signer_unavailable"](reason="/run/signer.sock"))

    assert set(mpp_outcomes._SLUGS) <= set(PaychanError.table)
    assert (inside["type"].rpartition("/")[2], inside["detail"]) == (
        "verification-failed",
        "the signer is not available",
    )
