"""x402: headers, offers, payments and outcomes against frozen vectors, the SDK's own bytes, and broken input."""

from __future__ import annotations

import base64
import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paychan.chain.electrum.session import _GENESIS
from paychan.protocol import unpaid
from paychan.protocol.errors import PaychanError, UnknownChannel, ValueBackwards
from paychan.protocol.payment import Payment
from paychan.protocol.types import MAX_MONEY_SAT, Network, OutPoint, Sat, UnixTime
from paychan.protocol.unpaid import MalformedPayment, PaymentTooLarge, PaymentUnsupported
from paychan.protocol.wire import x402, x402_outcomes
from paychan.protocol.wire.members import MAX_TX_BYTES
from paychan.protocol.wire.offers import (
    CHAINS,
    UNITS,
    ChannelState,
    Close,
    Offer,
    Open,
    Settled,
    Voucher,
    address_network,
    asset_of,
    chain_of,
    word_of,
)
from paychan.protocol.wire.x402_json import (
    MAX_HEADER_BYTES,
    encode_header,
    payment_of,
    read_payment,
    read_required,
    read_response,
    requirements_of,
)
from tests.lib import paidvectors as vectors
from tests.lib.looped import looped
from tests.lib.vectors import read_vectors

VALID, INVALID, SDK = (read_vectors(f"x402/{name}.json") for name in ("valid", "invalid", "sdk"))

sats = st.integers(0, MAX_MONEY_SAT).map(Sat)
outpoints = st.builds(OutPoint, st.binary(min_size=32, max_size=32), st.integers(0, 0xFFFFFFFF))
counts = st.integers(0, 0xFFFFFFFF)
keys = st.sampled_from([vectors.TERMS.client_key, vectors.TERMS.server_key, vectors.OFFER.identity])
offers = st.builds(
    lambda word, **parts: Offer(chain=CHAINS[word], network=word, **parts),
    st.sampled_from(sorted(CHAINS)),
    amount_sat=sats,
    unit=st.sampled_from(UNITS),
    identity=keys,
    pay_url=st.text(min_size=1, max_size=80),
    open_price_sat=sats,
    min_confirmations=counts,
    settlement_period_seconds=counts,
    dust_sat=sats,
    realm=st.text(max_size=32),
    description=st.text(max_size=80),
    suggested_deposit_sat=st.none() | sats,
)
signatures = st.binary(min_size=9, max_size=73)
vouchers = st.builds(Voucher, outpoints, sats, sats, signatures)
actions = (
    vouchers
    | st.builds(Close, vouchers)
    | st.builds(
        Open, vouchers, keys, counts.map(UnixTime), st.binary(min_size=1, max_size=34),
        st.none() | st.binary(min_size=60, max_size=MAX_TX_BYTES),
    )
)  # fmt: skip


OTHER_TERMS: list[dict[str, Any]] = [
    {"amount_sat": Sat(26)},
    {"unit": "byte"},
    {"chain": CHAINS["signet"]},
    {"identity": vectors.TERMS.client_key},
    {"pay_url": "https://pay.example/"},
    {"open_price_sat": Sat(1)},
    {"min_confirmations": 5},
    {"settlement_period_seconds": 1},
    {"dust_sat": Sat(701)},
    {"suggested_deposit_sat": Sat(1)},
]
"""Changes of the vectors' offer, one term each."""


@st.composite
def states(draw: st.DrawFn, *, proven: bool | None = None) -> ChannelState:
    """Any channel: it has spent part of its accepted value, and may have carried credit over from a withdrawal."""
    payment = Payment(draw(sats), draw(st.binary(min_size=8, max_size=72)), draw(st.integers(0, 255)))
    accepted = draw(st.integers(0, MAX_MONEY_SAT - payment.change_sat))
    carried = draw(st.integers(0, MAX_MONEY_SAT - accepted))
    proof = draw(st.booleans()) if proven is None else proven
    return ChannelState(
        draw(outpoints),
        Sat(payment.change_sat + accepted),
        Sat(accepted),
        Sat(draw(st.integers(0, accepted))),
        UnixTime(draw(counts)),
        payment if proof else None,
        Sat(carried),
    )


# --- vectors ----------------------------------------------------------------------------------------------------------


def test_the_vectors_are_those_of_the_code() -> None:
    """`python -m tests.lib.paidvectors` writes the files as they are: no header changed its bytes or its meaning."""
    made = json.loads(json.dumps(vectors.files()))

    for name, content in made.items():
        assert read_vectors(name) == content, name


@looped("case", VALID["cases"], ids=lambda case: case["name"])
def test_a_valid_header_has_its_meaning(case: dict[str, Any]) -> None:
    """The value is standard base64 of the JSON beside it, and is read as the vector says."""
    assert json.loads(base64.b64decode(case["value"], validate=True)) == case["json"]
    assert vectors.judge_x402(case["header"], case["value"]) == case["meaning"]


@looped("case", INVALID["cases"], ids=lambda case: case["name"])
def test_an_invalid_header_has_its_code(case: dict[str, Any]) -> None:
    """The value is refused by the code that the vector names."""
    assert case["code"] in {*PaychanError.table, "no offer"}
    assert vectors.judge_x402(case["header"], case["value"]) == case["code"]


def test_headers_of_the_sdk_are_read() -> None:
    """The SDK writes other bytes for the same offer, payment and success; all three are read."""
    meanings = {case["name"]: case["meaning"] for case in VALID["cases"]}

    assert vectors.judge_x402("PAYMENT-REQUIRED", SDK["PAYMENT-REQUIRED"]) == meanings["an offer"]
    assert vectors.judge_x402("PAYMENT-SIGNATURE", SDK["PAYMENT-SIGNATURE"]) == meanings["a payment"]
    assert vectors.judge_x402("PAYMENT-RESPONSE", SDK["PAYMENT-RESPONSE"]) == meanings["a success"]


def test_golden_offer() -> None:
    """A PaymentRequired by hand has exactly these bytes."""
    required = msgspec.structs.replace(x402.payment_required(vectors.OFFER, "https://a.example/"), extensions=None)
    text = (
        '{"x402Version":2,"accepts":[{"scheme":"batch-settlement","network":"bip122:0f9188f13cb7b2c71f2a335e3a4fc328",'
        '"amount":"25","asset":"bip122:0f9188f13cb7b2c71f2a335e3a4fc328/slip44:1",'
        '"payTo":"0279be667ef9dcbbac55a06295ce870b07029bfcdb2dce28d959f2815b16f81798","maxTimeoutSeconds":60,'
        '"extra":{"assetTransferMethod":"bitcoin-channel","binding":"bitcoin-channel-v1","payUrl":"https://pay.example",'
        '"openPriceSat":"70000","minConfirmations":6,"settlementPeriodSeconds":21600,"dustLimitSat":"700"}}],'
        '"resource":{"url":"https://a.example/","description":"one map tile","serviceName":"api.example"},'
        '"error":"Payment required"}'
    )

    assert encode_header(required) == base64.b64encode(text.encode()).decode()


# --- chains -----------------------------------------------------------------------------------------------------------


def test_chains_are_named_by_their_first_blocks() -> None:
    """The CAIP-2 id of each network is the head of its genesis hash, which the Electrum backend compares, too."""
    known = {chain_of(block): network for network, blocks in _GENESIS.items() for block in blocks}

    assert set(known) == set(CHAINS.values())
    assert all(address_network(chain) is network for chain, network in known.items())
    assert {word_of(chain) for chain, network in known.items() if network is Network.REGTEST} == {"regtest"}
    assert {word_of(chain) for chain, network in known.items() if network is Network.LIVE} == {"mainnet"}
    with pytest.raises(PaymentUnsupported, match="bip122:000000000000000000000000deadbeef"):
        chain_of("000000000000000000000000deadbeef" * 2)


def test_assets_are_coin_types() -> None:
    """SLIP-44 has 0 for bitcoins and 1 for the coins of all test networks."""
    assert asset_of(CHAINS["mainnet"]) == "bip122:000000000019d6689c085ae165831e93/slip44:0"
    assert {asset_of(chain).partition("/")[2] for word, chain in CHAINS.items() if word != "mainnet"} == {"slip44:1"}


# --- round trips ------------------------------------------------------------------------------------------------------


@given(offers, st.none() | states(), st.text(max_size=40))
def test_an_offer_comes_back(offer: Offer, state: ChannelState | None, url: str) -> None:
    """A payer reads from the header what the server offered, with the state that corrects it."""
    header = encode_header(x402.payment_required(offer, url, state=state))
    required = read_required(header)
    found = x402.offers(required)

    assert [(each.offer, each.state) for each in found] == [(offer, state)]
    assert required.resource is not None
    assert required.resource.url == url
    assert x402.mismatch(found[0].accepted, offer) is None


@given(actions, st.none() | st.from_regex(r"\A[a-zA-Z0-9_-]{16,128}\Z"))
def test_a_payment_comes_back(action: Voucher | Open | Close, name: str | None) -> None:
    """A server reads from the header what the payer wrote, with the name of its request; so does a facilitator."""
    found = x402.Found(vectors.OFFER, x402.requirements(vectors.OFFER))
    header = x402.payment_header(found, action, identifier=name or "")
    payload = read_payment(header)

    assert len(header) <= MAX_HEADER_BYTES
    assert x402.action_of(payload.payload) == action
    assert x402.identifier_of(payload) == name
    assert payment_of(json.loads(base64.b64decode(header))) == payload


@given(states(proven=False), sats, st.just(b"") | keys)
def test_a_success_comes_back(state: ChannelState, charged_sat: Sat, key: bytes) -> None:
    """A payer reads from the header what the server charged, and the channel after it."""
    settled = Settled(state, charged_sat, key)
    response = read_response(encode_header(x402_outcomes.settled_json(settled, vectors.OFFER.chain)))

    assert x402_outcomes.read_settled(response) == settled
    assert response.transaction == f"paychan:{state.channel}:{state.change_sat}"


# --- offers against payments --------------------------------------------------------------------------------------------


@looped("change", OTHER_TERMS, ids=lambda change: next(iter(change)))
def test_a_payment_for_other_terms_is_refused(change: dict[str, Any]) -> None:
    """A payment that chose an offer is refused as soon as one term of the offer is another."""
    now_asked = msgspec.structs.replace(vectors.OFFER, **change)

    assert x402.mismatch(x402.requirements(vectors.OFFER), vectors.OFFER) is None
    assert isinstance(x402.mismatch(x402.requirements(vectors.OFFER), now_asked), unpaid.OfferMismatch)


def test_more_members_of_extra_are_taken() -> None:
    """A payment for a corrective offer, and one with members of its own, fits the offer."""
    accepted = x402.requirements(vectors.OFFER, vectors.STATE)
    more = msgspec.structs.replace(accepted, extra=accepted.extra | {"wallet": "x"})

    assert x402.mismatch(more, vectors.OFFER) is None


def test_true_is_not_one() -> None:
    """A boolean in place of a number is another value."""
    offer = msgspec.structs.replace(vectors.OFFER, min_confirmations=1)
    accepted = x402.requirements(offer)
    odd = msgspec.structs.replace(accepted, extra=accepted.extra | {"minConfirmations": True})

    assert x402.mismatch(odd, offer) is not None


def test_offers_that_this_binding_can_not_pay_are_left_out() -> None:
    """A payer skips other schemes, other bindings, other chains, wrong assets, and entries without the form."""
    way = msgspec.to_builtins(x402.requirements(vectors.OFFER))
    foreign = [
        {"scheme": "exact", "maxAmountRequired": "1"},
        "text",
        None,
        way | {"scheme": "exact"},
        way | {"extra": way["extra"] | {"binding": "bitcoin-channel-v2"}},
        way | {"extra": way["extra"] | {"assetTransferMethod": "gobtc-rails-preauthorized-psbt"}},
        way | {"extra": way["extra"] | {"unit": "hour"}},
        way | {"network": "bip122:ffffffffffffffffffffffffffffffff"},
        way | {"asset": "bip122:0f9188f13cb7b2c71f2a335e3a4fc328/slip44:0"},
        way | {"amount": "25.0"},
        way | {"payTo": "ff" * 33},
        way | {"extra": way["extra"] | {"payUrl": ""}},
        way | {"extra": way["extra"] | {"channelState": []}},
    ]
    header = vectors.base64_of({"x402Version": 2, "accepts": [*foreign, way]})

    assert [each.offer.amount_sat for each in x402.offers(read_required(header))] == [25]
    assert x402.offers(read_required(vectors.base64_of({"x402Version": 2, "accepts": foreign}))) == []


# --- broken input -------------------------------------------------------------------------------------------------------


@looped("read", [read_payment, read_required, read_response])
def test_a_header_that_is_too_long_is_not_decoded(read: Any) -> None:
    """The limit counts characters of the header; the refusal has both numbers."""
    longest = base64.b64encode(b" " * (MAX_HEADER_BYTES // 4 * 3)).decode()

    with pytest.raises(MalformedPayment):
        read(longest)
    with pytest.raises(PaymentTooLarge, match=rf"got {MAX_HEADER_BYTES + 4} bytes, limit {MAX_HEADER_BYTES} bytes"):
        read(longest + "ICAg")


@looped("read", [read_payment, read_required, read_response])
def test_deep_nesting_is_refused(read: Any) -> None:
    """Thousands of brackets are a refusal, not a crash."""
    for text in (b'{"a":' * 2000, b"[" * 12_000, b'{"x402Version":2,"accepts":[' + b"[" * 5000 + b"]" * 5000 + b"]}"):
        with pytest.raises(MalformedPayment):
            read(base64.b64encode(text).decode())


def test_a_funding_transaction_has_a_limit() -> None:
    """The longest transaction fits into a header; a longer one is refused by its size."""
    payload = x402.payload_of(
        Open(vectors.FIRST, vectors.TERMS.client_key, vectors.EXPIRY, b"\x51", b"\0" * MAX_TX_BYTES)
    )
    found = x402.Found(vectors.OFFER, x402.requirements(vectors.OFFER))
    header = x402.payment_header(
        found, x402.action_of(payload), x402.payment_required(vectors.OFFER, "x" * 400).resource
    )

    assert len(header) <= MAX_HEADER_BYTES
    with pytest.raises(MalformedPayment, match="fundingTx"):
        x402.action_of(payload | {"fundingTx": "00" * (MAX_TX_BYTES + 1)})


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=12), inner, max_size=3),
    max_leaves=8,
)
NAMES = sorted({*x402.payload_of(vectors.ACTIONS["an opening with its funding transaction"])})


@given(st.dictionaries(st.sampled_from(NAMES), values), st.sampled_from(["payment", "open", "close"]))
def test_any_payload_is_read_or_refused(members: dict[str, Any], kind: str) -> None:
    """Any value of any member is read or refused; nothing else is raised."""
    payload = x402.payload_of(vectors.ACTIONS["an opening with its funding transaction"]) | members
    try:
        assert x402.payload_of(x402.action_of(payload | {"type": kind}))["type"] == kind
    except MalformedPayment as error:
        assert set(error.fields) == {"field", "reason"}  # noqa: PT017 - either way is right


@given(st.text() | st.binary().map(lambda raw: base64.b64encode(raw).decode()) | values.map(vectors.base64_of))
def test_any_header_is_read_or_refused(text: str) -> None:
    """Any text of any header is read or refused; nothing else is raised."""
    for read in (read_payment, read_required, read_response):
        with pytest.raises(PaychanError):
            read(text)


@given(values)
def test_any_object_is_read_or_refused(value: Any) -> None:
    """Any JSON in place of a payment or of requirements is refused."""
    for read in (payment_of, requirements_of):
        with pytest.raises(PaychanError):
            read(value)


# --- outcomes -----------------------------------------------------------------------------------------------------------


def test_a_corrective_offer_has_the_code_and_the_proof() -> None:
    """A payer that is behind gets the newest payment, and finds its own signature in it."""
    error = ValueBackwards(got_sat=99_975, need_sat=99_950)
    required = x402.payment_required(vectors.OFFER, vectors.URL, error=error, state=vectors.STATE)
    state = x402.offers(read_required(encode_header(required)))[0].state

    assert required.error == "invalid_batch_settlement_bitcoin_value_backwards"
    assert state is not None
    assert state.newest is not None
    assert vectors.VERIFIER.problem(state.newest, vectors.DUST) is None


def test_a_state_without_proof_shows_no_signature() -> None:
    """A caller that showed no authentic payment gets no signature."""
    payment = vectors.SIGNER.payment(Sat(99_950))
    state = msgspec.structs.replace(vectors.STATE, newest=None)

    shown = json.dumps(msgspec.to_builtins(x402.requirements(vectors.OFFER, state)))

    assert "voucherState" not in shown
    assert payment.signature.hex() not in shown


def test_every_mapped_code_exists() -> None:
    """Codes of the binding belong to refusals of this project, and each is one of the binding's page."""
    codes = {*x402_outcomes._CODES, *x402_outcomes._GENERIC}

    assert codes <= set(PaychanError.table)
    assert not set(x402_outcomes._CODES) & set(x402_outcomes._GENERIC)


def test_a_refusal_says_its_code_and_no_inside() -> None:
    """A failure has the binding's code, and the public text if the refusal has one."""
    failure = x402_outcomes.refused_json(UnknownChannel(), vectors.OFFER.chain)
    inside = x402_outcomes.verified_json(PaychanError.table["signer_unavailable"](reason="/run/signer.sock"))

    assert (failure.success, failure.transaction) == (False, "")
    assert failure.error_reason == "invalid_batch_settlement_bitcoin_channel_not_found"
    assert (inside.is_valid, inside.invalid_reason) == (False, "unexpected_settle_error")
    assert inside.invalid_message == "the signer is not available"
    assert x402_outcomes.verified_json(None, vectors.TERMS.client_key).payer == vectors.TERMS.client_key.hex()
