"""Vectors of paid HTTP requests, x402 and MPP: `python -m tests.lib.paidvectors` writes `tests/vectors/x402` and `mpp`.

A test compares the files with the code. The keys of the channel are SHA-256 of the names in `KEYS`; signatures follow
from RFC 6979, so that every run writes the same bytes.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from hashlib import sha256
from typing import Any

import msgspec
from coincurve import PrivateKey

from paychan.protocol.errors import PaychanError, UnknownChannel, ValueBackwards
from paychan.protocol.kinds.base import make_terms
from paychan.protocol.payment import Payment, PaymentSigner, PaymentVerifier
from paychan.protocol.types import OutPoint, Sat, UnixTime
from paychan.protocol.wire import mpp, mpp_outcomes, x402, x402_outcomes
from paychan.protocol.wire.mpp_challenge import challenge_header, challenge_id
from paychan.protocol.wire.offers import CHAINS, ChannelState, Close, Offer, Open, Settled, Voucher, asset_of
from paychan.protocol.wire.x402_json import (
    REQUIRED_HEADER,
    RESPONSE_HEADER,
    SIGNATURE_HEADER,
    encode_header,
    read_payment,
    read_required,
    read_response,
)
from tests.lib.vectors import DIRECTORY

KEYS = {"client": "paychan vector client", "server": "paychan vector server"}
CLIENT, SERVER = (PrivateKey(sha256(text.encode()).digest()) for text in KEYS.values())
EXPIRY, CAPACITY, DUST = UnixTime(1_796_000_000), Sat(100_000), Sat(700)
CHANNEL = OutPoint(bytes(range(32)), 1)
TERMS = make_terms(SERVER.public_key.format(), CLIENT.public_key.format(), EXPIRY)
CHANGE_SCRIPT = bytes.fromhex("76a91489abcdefabbaabbaabbaabbaabbaabbaabbaabba88ac")
SIGNER = PaymentSigner(CLIENT, TERMS, CHANNEL, CAPACITY, CHANGE_SCRIPT)
VERIFIER = PaymentVerifier(TERMS, CHANNEL, CAPACITY, CHANGE_SCRIPT)

SECRET, OLD_SECRET = b"paychan-vector-secret", b"paychan-vector-secret-before"
EXPIRES = UnixTime(1_796_126_400)
"""2026-12-01T12:00:00Z."""

OFFER = Offer(
    amount_sat=Sat(25),
    unit="request",
    chain=CHAINS["regtest"],
    identity=bytes.fromhex("0279be667ef9dcbbac55a06295ce870b07029bfcdb2dce28d959f2815b16f81798"),
    pay_url="https://pay.example",
    network="regtest",
    open_price_sat=Sat(70_000),
    min_confirmations=6,
    settlement_period_seconds=21_600,
    dust_sat=DUST,
    realm="api.example",
    description="one map tile",
)
METERED = msgspec.structs.replace(
    OFFER,
    amount_sat=Sat(2),
    unit="kilobyte",
    chain=CHAINS["mainnet"],
    network="mainnet",
    suggested_deposit_sat=Sat(90_000),
)
URL = "https://api.example/v1/tile"


def voucher(change_sat: int) -> Voucher:
    """Sign the payment that leaves `change_sat` to the client."""
    return Voucher.of(CHANNEL, CAPACITY, SIGNER.payment(Sat(change_sat)))


FIRST = voucher(99_975)
ACTIONS = {
    "a payment": FIRST,
    "a payment of the whole capacity, which leaves no change": voucher(0),
    "an opening whose funding transaction the network has": Open(FIRST, TERMS.client_key, EXPIRY, CHANGE_SCRIPT),
    "an opening with its funding transaction": Open(FIRST, TERMS.client_key, EXPIRY, CHANGE_SCRIPT, bytes(range(80))),
    "a close": Close(FIRST),
}
STATE = ChannelState(CHANNEL, CAPACITY, Sat(50), Sat(40), EXPIRY, SIGNER.payment(Sat(99_950)))
SETTLED = Settled(msgspec.structs.replace(STATE, newest=None), Sat(25), TERMS.client_key)


def setting() -> dict[str, Any]:
    """Return the channel, the offers and the secrets by which the vectors are judged."""
    return {
        "channel": {
            "client_private_key": CLIENT.to_hex(),
            "server_public_key": SERVER.public_key.format().hex(),
            "expiry": EXPIRY,
            "redeem_script": TERMS.redeem_script.hex(),
            "outpoint": str(CHANNEL),
            "capacity_sat": CAPACITY,
            "change_script": CHANGE_SCRIPT.hex(),
            "dust_sat": DUST,
        },
        "offer": shown(OFFER),
        "secrets": [SECRET.decode(), OLD_SECRET.decode()],
        "now": EXPIRES,
    }


def shown(value: Any) -> Any:
    """Return a value of `wire/offers.py` as JSON: bytes as hex, an outpoint as `txid:index`."""
    if isinstance(value, OutPoint):
        return str(value)
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, Payment):
        return {"change_sat": value.change_sat, "signature": value.signature_with_flag.hex()}
    if isinstance(value, msgspec.Struct):
        kind = {"action": type(value).__name__.lower()} if isinstance(value, Voucher | Open | Close) else {}
        return kind | {name: shown(getattr(value, name)) for name in value.__struct_fields__}
    return value


def payment_problem(action: Voucher | Open | Close) -> PaychanError | None:
    """Return why the payment of an action is not valid for the channel of the vectors, or None."""
    paid = action if isinstance(action, Voucher) else action.voucher
    if paid.channel != CHANNEL:
        return UnknownChannel()
    return paid.mismatch(CAPACITY) or VERIFIER.problem(paid.payment, DUST)


# --- x402 -----------------------------------------------------------------------------------------------------------


def judge_x402(header: str, value: str) -> Any:
    """Read a header as a server or a payer does: return what it says, or the code of the refusal."""
    try:
        if header == REQUIRED_HEADER:
            found = x402.offers(read_required(value))
            return [{"offer": shown(each.offer), "state": shown(each.state)} for each in found] or "no offer"
        if header == RESPONSE_HEADER:
            return shown(x402_outcomes.read_settled(read_response(value)))
        payload = read_payment(value)
        if (problem := x402.mismatch(payload.accepted, OFFER)) is not None:
            return problem.code
        action, name = x402.action_of(payload.payload), x402.identifier_of(payload)
        problem = payment_problem(action)
        return problem.code if problem else {"action": shown(action), "payment_identifier": name}
    except PaychanError as error:
        return error.code


def case(name: str, header: str, value: str, meaning: Any) -> dict[str, Any]:
    """Return a vector, with the JSON inside its value if it has any."""
    inside = value.removeprefix("Payment ")
    try:
        content = json.loads(base64.b64decode(inside.replace("-", "+").replace("_", "/") + "==="[: -len(inside) % 4]))
    except ValueError:
        content = None
    return {"name": name, "header": header, "value": value, "json": content, "meaning": meaning}


def x402_headers() -> Iterator[tuple[str, str, str]]:
    """Yield name, header and value of each valid vector."""
    yield "an offer", REQUIRED_HEADER, encode_header(x402.payment_required(OFFER, URL, mime_type="image/png"))
    yield "an offer with a unit and a deposit", REQUIRED_HEADER, encode_header(x402.payment_required(METERED, URL))
    corrective = x402.payment_required(OFFER, URL, error=ValueBackwards(got_sat=99_975, need_sat=99_950), state=STATE)
    yield "an offer that corrects the payer", REQUIRED_HEADER, encode_header(corrective)
    foreign = msgspec.structs.replace(
        x402.requirements(OFFER), extra={"assetTransferMethod": "gobtc-rails-preauthorized-psbt"}
    )
    both = x402.payment_required(OFFER, URL)
    both = msgspec.structs.replace(both, accepts=[foreign, *both.accepts])
    yield "an offer beside one of another binding of the scheme", REQUIRED_HEADER, encode_header(both)
    found = x402.Found(OFFER, x402.requirements(OFFER))
    resource = x402.payment_required(OFFER, URL).resource
    for name, action in ACTIONS.items():
        yield name, SIGNATURE_HEADER, x402.payment_header(found, action, resource)
    yield "a payment with a name", SIGNATURE_HEADER, x402.payment_header(found, FIRST, None, "order-0001-20261201")
    yield "a success", RESPONSE_HEADER, encode_header(x402_outcomes.settled_json(SETTLED, OFFER.chain))


def base64_of(value: Any) -> str:
    """Write any JSON, or bytes, as x402's headers do."""
    return base64.b64encode(value if isinstance(value, bytes) else json.dumps(value).encode()).decode()


def x402_broken() -> Iterator[tuple[str, str, str]]:
    """Yield name, header and value of each vector that must be refused."""
    found = x402.Found(OFFER, x402.requirements(OFFER))
    good = x402.payment_header(found, FIRST)
    plain = json.loads(base64.b64decode(good))
    raw = json.dumps(plain).encode()
    loose = base64_of(raw + b" " * (2 - len(raw) % 3))
    loose = loose[:-2] + chr(ord(loose[-2]) + 1) + "="
    for name, text in {
        "empty": "",
        "the alphabet of base64url": base64.urlsafe_b64encode(
            b'{"x402Version":2,"a":"\xc3\xbf\xc3\xbf\xc3\xbe\xc3\xbe?>"}'
        ).decode(),
        "padding left out": base64_of(b'{"x402Version":2}').rstrip("="),
        "bits after the end": loose,
        "a line break": good[:76] + "\n" + good[76:],
        "not UTF-8": base64_of(b'{"x402Version":2,"\xff":1}'),
        "not JSON": base64_of(b'{"x402Version":2'),
        "an array": base64_of([2]),
        "a key twice": base64_of(b'{"x402Version":2,' + json.dumps(plain)[1:].encode()),
        "a lone surrogate": base64_of(b'{"x402Version":2,"accepted":"\\ud800"}'),
        "a number that JSON lacks": base64_of(b'{"x402Version":2,"accepted":NaN}'),
        "version 1": base64_of(plain | {"x402Version": 1}),
        "no version": base64_of({name: value for name, value in plain.items() if name != "x402Version"}),
        "no accepted": base64_of({name: value for name, value in plain.items() if name != "accepted"}),
        "a payload that is a text": base64_of(plain | {"payload": "x"}),
        "a short name": base64_of(plain | {"extensions": {"payment-identifier": {"info": {"id": "short"}}}}),
    }.items():
        yield name, SIGNATURE_HEADER, text
    changes: dict[str, dict[str, Any]] = {
        "scheme": {"scheme": "exact"},
        "network": {"network": CHAINS["mainnet"]},
        "amount, after the price rose": {"amount": "24"},
        "amount as a number": {"amount": 25},
        "asset": {"asset": asset_of(CHAINS["mainnet"])},
        "payTo": {"payTo": TERMS.server_key.hex()},
        "maxTimeoutSeconds": {"maxTimeoutSeconds": 61},
        "extra.payUrl": {"extra": plain["accepted"]["extra"] | {"payUrl": "https://other.example"}},
        "extra without dustLimitSat": {
            "extra": {name: item for name, item in plain["accepted"]["extra"].items() if name != "dustLimitSat"}
        },
    }
    for name, change in changes.items():
        yield f"another offer: {name}", SIGNATURE_HEADER, base64_of(plain | {"accepted": plain["accepted"] | change})
    for name, payload in broken_payloads(plain["payload"], "type", "channel", "cumulativeSat"):
        yield name, SIGNATURE_HEADER, base64_of(plain | {"payload": payload})
    required = json.loads(base64.b64decode(encode_header(x402.payment_required(OFFER, URL, state=STATE))))
    yield "an offer without accepts", REQUIRED_HEADER, base64_of({"x402Version": 2, "accepts": {}})
    for name, part in {"creditSat": "9", "changeSat": "99949", "spentSat": "39"}.items():
        wrong = json.loads(json.dumps(required))
        wrong["accepts"][0]["extra"]["channelState"][name] = part
        yield f"a channelState whose {name} contradicts the others", REQUIRED_HEADER, base64_of(wrong)
    failure = x402_outcomes.refused_json(UnknownChannel(), OFFER.chain)
    yield "a failure, which is no success", RESPONSE_HEADER, encode_header(failure)


def short(text: str) -> str:
    """Return a text for a name: of a long one, its ends."""
    return text if len(text) <= 30 else f"{text[:9]}…{text[-15:]}"


def with_payment(good: dict[str, Any], change_sat: int, cumulative: str) -> dict[str, Any]:
    """Return a payload with another payment, which is signed."""
    payment = SIGNER.payment(Sat(change_sat))
    return good | {
        "changeSat": str(change_sat),
        cumulative: str(CAPACITY - change_sat),
        "signature": payment.signature.hex(),
        "sighash": payment.flag,
    }


def broken_payloads(
    good: dict[str, Any], kind: str, channel: str, cumulative: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield payloads with one wrong member; the arguments are the protocol's names of three members."""
    txid = CHANNEL.txid_hex
    wrong: dict[str, list[Any]] = {
        kind: ["deposit", "topUp", None, 1],
        channel: [txid, f"{txid.upper()}:1", f"{txid}:01", f"{txid}:4294967296", f"{txid[2:]}:1", f"{txid}:2", 1, None],
        "changeSat": ["", "-1", "+1", "099975", "99975.0", "2100000000000001", "\uff19", 99_975, None, "699", "99974"],
        cumulative: ["26", "0", 25, None],
        "sighash": [130, 1, 256, -1, True, "131", 131.5, None],
        "signature": ["", good["signature"].upper(), good["signature"][:-1], good["signature"] + "00", "30" * 73, None],
    }
    for name, values in wrong.items():
        for value in values:
            shown_value = "missing" if value is None else short(json.dumps(value))
            yield (
                f"{name} {shown_value}",
                {key: item for key, item in (good | {name: value}).items() if item is not None},
            )
    yield "change below the dust limit", with_payment(good, 699, cumulative)
    yield "the signature of another payment", good | {"signature": SIGNER.payment(Sat(99_950)).signature.hex()}
    high = FIRST.payment.signature
    order = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141
    s_at = 4 + high[3] + 2
    s = (order - int.from_bytes(high[s_at:], "big")).to_bytes(33, "big")
    der = high[4 : 4 + high[3]]
    high = bytes([0x30, 4 + len(der) + 33, 2, len(der)]) + der + bytes([2, 33]) + s
    yield "signature with S in the upper half", good | {"signature": high.hex()}
    opening = good | {kind: "open", "fundingTx": None, "clientKey": TERMS.client_key.hex(), "expiry": EXPIRY}
    opening["changeScript"] = CHANGE_SCRIPT.hex()
    for name, values in {
        "clientKey": ["02" + "00" * 32, "04" + "11" * 32, TERMS.client_key.hex().upper(), None],
        "expiry": [-1, 2**32, "1796000000", None],
        "changeScript": ["", "51" * 35, None],
        "fundingTx": ["", "00", "zz" * 60],
    }.items():
        for value in values:
            shown_value = "missing" if value is None else short(json.dumps(value))
            members = opening | {name: value}
            yield (
                f"open: {name} {shown_value}",
                {key: item for key, item in members.items() if item is not None or key == "fundingTx"},
            )


# --- MPP ------------------------------------------------------------------------------------------------------------


def judge_mpp(header: str, value: str) -> Any:
    """Read a header as a server or a payer does: return what it says, or the code of the refusal."""
    try:
        if header == "WWW-Authenticate":
            found = mpp.offers([value])
            return [{"offer": shown(each.offer), "state": shown(each.state)} for each in found] or "no offer"
        if header == mpp_outcomes.RECEIPT_HEADER:
            return shown(mpp_outcomes.read_receipt(value))
        credential = mpp.read_credential(value)
        if credential is None:
            return "another scheme"
        problem = mpp.challenge_problem(credential, OFFER, (SECRET, OLD_SECRET), EXPIRES)
        if problem is not None:
            return problem.code
        action = mpp.action_of(credential.payload)
        problem = payment_problem(action)
        return problem.code if problem else {"action": shown(action), "source": credential.source}
    except PaychanError as error:
        return error.code


def mpp_headers() -> Iterator[tuple[str, str, str]]:
    """Yield name, header and value of each valid vector."""
    offered = mpp.challenge(OFFER, SECRET, EXPIRES)
    field = "WWW-Authenticate"
    yield "an offer", field, challenge_header(offered)
    yield "an offer with a unit and a deposit", field, challenge_header(mpp.challenge(METERED, SECRET, EXPIRES))
    yield (
        "an offer that corrects the payer",
        field,
        challenge_header(mpp.challenge(OFFER, SECRET, EXPIRES, state=STATE)),
    )
    odd = msgspec.structs.replace(OFFER, description='a "map", \\ é 😀')
    yield "an offer whose description needs escapes", field, challenge_header(mpp.challenge(odd, SECRET, EXPIRES))
    elsewhere = mpp.challenge(OFFER, SECRET, EXPIRES, digest="sha-256=:abc=:", header="Payment-Authorization")
    yield "an offer with digest and header", field, challenge_header(elsewhere)
    others = 'Basic realm="a, Payment id=1", Negotiate abc==, payment id="x", realm="y"'
    yield "an offer among other challenges", field, f"{others}, {challenge_header(offered)},, Bearer"
    for name, action in ACTIONS.items():
        yield name.replace("a payment", "a voucher"), "Authorization", mpp.credential_header(offered, action)
    before = mpp.challenge(OFFER, OLD_SECRET, EXPIRES)
    yield (
        "a voucher for a challenge by the old secret",
        "Authorization",
        mpp.credential_header(before, FIRST, "did:key:z6Mk"),
    )
    named = mpp.challenge(OFFER, SECRET, EXPIRES, state=STATE)
    yield "a voucher for a challenge that names a channel", "Payment-Authorization", mpp.credential_header(named, FIRST)
    receipt = mpp_outcomes.Receipt(SETTLED, offered.id, EXPIRES)
    yield "a receipt", mpp_outcomes.RECEIPT_HEADER, mpp_outcomes.receipt_header(receipt)


def base64url_of(value: Any) -> str:
    """Write any JSON, or bytes, as MPP's headers do."""
    return base64_of(value).rstrip("=").replace("+", "-").replace("/", "_")


def signed(offer: Offer, **changes: Any) -> str:
    """Return a credential for a challenge with other members that the server has signed."""
    unsigned = msgspec.structs.replace(mpp.challenge(offer, SECRET, EXPIRES), **changes)
    return mpp.credential_header(msgspec.structs.replace(unsigned, id=challenge_id(unsigned, SECRET)), FIRST)


def mpp_broken() -> Iterator[tuple[str, str, str]]:
    """Yield name, header and value of each vector that must be refused."""
    offered = mpp.challenge(OFFER, SECRET, EXPIRES)
    plain = {"challenge": msgspec.to_builtins(offered), "payload": mpp.payload_of(FIRST)}
    texts = {
        "another scheme": "Bearer abc",
        "empty": "Payment ",
        "padding": "Payment " + base64url_of(plain) + "==",
        "the alphabet of standard base64": "Payment " + base64_of(b'{"a":"\xc3\xbf\xc3\xbf?>"}').rstrip("="),
        "bits after the end": "Payment e31",
        "two values": f"Payment {base64url_of(plain)} {base64url_of(plain)}",
        "not JSON": "Payment " + base64url_of(b"{"),
        "a key twice": "Payment " + base64url_of(b'{"payload":{},' + json.dumps(plain)[1:].encode()),
        "no payload": "Payment " + base64url_of({"challenge": plain["challenge"]}),
        "a challenge that is a text": "Payment " + base64url_of(plain | {"challenge": "x"}),
        "a source that is an object": "Payment " + base64url_of(plain | {"source": {}}),
        "a request that can't be written canonically": "Payment "
        + base64url_of(plain | {"challenge": plain["challenge"] | {"request": {"amount": 0.5}}}),
        "the challenge of another secret": mpp.credential_header(mpp.challenge(OFFER, b"other", EXPIRES), FIRST),
        "an expired challenge": signed(OFFER, expires="2026-12-01T11:59:59Z"),
        "a challenge for another price": signed(msgspec.structs.replace(OFFER, amount_sat=Sat(24))),
        "a challenge for another realm": signed(msgspec.structs.replace(OFFER, realm="other.example")),
        "a challenge for another chain": signed(METERED),
        "a challenge for another intent": signed(OFFER, intent="charge"),
        "a challenge whose request is no JSON": signed(OFFER, request="e30x"),
        "a challenge without expires": signed(OFFER, expires=None),
        "a challenge whose expires is no time": signed(OFFER, expires="soon"),
        "a challenge with a month 13": signed(OFFER, expires="2026-13-01T12:00:00Z"),
        "a challenge for another body": signed(OFFER, digest="sha-256=:abc=:"),
        "a challenge whose members moved": "Payment "
        + base64url_of(plain | {"challenge": plain["challenge"] | {"expires": offered.expires + "|", "digest": ""}}),
    }
    for name, text in texts.items():
        yield name, "Authorization", text
    for name in ("id", "realm", "method", "intent", "request", "expires"):
        echo = dict(plain["challenge"])
        echo[name] = echo[name][:-1] + ("A" if echo[name][-1] != "A" else "B")
        yield f"a changed {name}", "Authorization", "Payment " + base64url_of(plain | {"challenge": echo})
        echo = {key: item for key, item in plain["challenge"].items() if key != name}
        yield f"no {name}", "Authorization", "Payment " + base64url_of(plain | {"challenge": echo})
        echo = plain["challenge"] | {name: 1}
        yield f"{name} as a number", "Authorization", "Payment " + base64url_of(plain | {"challenge": echo})
    for name, payload in broken_payloads(plain["payload"], "action", "channelId", "cumulativeAmount"):
        yield name, "Authorization", "Payment " + base64url_of(plain | {"payload": payload})
    for name, text in {
        "a string without its end": 'Payment id="a',
        "a parameter twice": 'Payment id="a", ID="b"',
        "a parameter without a scheme": 'id="a"',
        "an equals sign alone": "Payment = 1",
    }.items():
        yield name, "WWW-Authenticate", text
    receipt = mpp_outcomes.receipt_json(mpp_outcomes.Receipt(SETTLED, offered.id, EXPIRES))
    for change in (
        {"status": "failed"},
        {"method": "tempo"},
        {"timestamp": "yesterday"},
        {"credit": "9"},
        {"acceptedCumulative": "100001", "spent": "99991"},
    ):
        name = ", ".join(f"{key} {item}" for key, item in change.items())
        yield f"a receipt with {name}", mpp_outcomes.RECEIPT_HEADER, base64url_of(receipt | change)


# --- files ----------------------------------------------------------------------------------------------------------


def files() -> dict[str, Any]:
    """Return the content of each file, by its path below `tests/vectors`."""
    made: dict[str, Any] = {}
    for protocol, valid, broken, judge in (
        ("x402", x402_headers, x402_broken, judge_x402),
        ("mpp", mpp_headers, mpp_broken, judge_mpp),
    ):
        cases = [case(*vector, judge(*vector[1:])) for vector in valid()]
        refused = [
            {"name": name, "header": header, "value": value, "code": judge(header, value)}
            for name, header, value in broken()
        ]
        made[f"{protocol}/valid.json"] = {"setting": setting(), "cases": cases}
        made[f"{protocol}/invalid.json"] = {"setting": setting(), "cases": refused}
    return made


def main() -> None:
    """Write the files."""
    for name, content in files().items():
        path = DIRECTORY / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
