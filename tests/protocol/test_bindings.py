"""The pages of the bindings say what the code does: their JSON, their codes, their chains."""

from __future__ import annotations

import json
import re
from typing import Any

import msgspec

from paychan.protocol.types import UnixTime
from paychan.protocol.wire import mpp, mpp_outcomes, x402, x402_outcomes
from paychan.protocol.wire.mpp_challenge import PARAMETERS
from paychan.protocol.wire.offers import CHAINS, UNITS
from paychan.protocol.wire.x402_json import MAX_HEADER_BYTES
from tests.lib import paidvectors as vectors
from tests.lib.readme import ROOT

X402, MPP = ((ROOT / "paychan" / "protocol" / "bindings" / f"{name}.md").read_text() for name in ("x402", "mpp"))


def json_of(page: str) -> list[dict[str, Any]]:
    """Return the JSON of a page's blocks."""
    return [json.loads(block) for block in re.findall(r"(?ms)^```json\n(.*?)^```", page)]


def members(value: Any) -> Any:
    """Return the names of an object's members, and of those inside them."""
    return {name: members(item) for name, item in value.items()} if isinstance(value, dict) else None


def test_the_offer_of_the_page_is_that_of_the_code() -> None:
    """The page of x402 shows the offer of the vectors, without the extension."""
    required = msgspec.structs.replace(x402.payment_required(vectors.OFFER, vectors.URL), extensions=None)

    assert json_of(X402)[0] == msgspec.to_builtins(required)


def test_the_request_of_the_page_is_that_of_the_code() -> None:
    """The page of MPP shows the request of the same offer."""
    assert json_of(MPP)[0] == mpp.request_json(vectors.OFFER)


def test_the_credential_of_the_page_has_all_members() -> None:
    """The credential has the members of a voucher and of a challenge."""
    shown = json_of(MPP)[1]

    assert members(shown["payload"]) == members(mpp.payload_of(vectors.FIRST))
    assert set(shown["challenge"]) == set(PARAMETERS) - {"digest", "header", "opaque"}


def test_the_answers_of_the_pages_have_all_members() -> None:
    """The success of x402 and the receipt of MPP have the members that the code writes, and sums that fit."""
    success = x402_outcomes.settled_json(vectors.SETTLED, vectors.OFFER.chain)
    receipt = mpp_outcomes.Receipt(vectors.SETTLED, "…", UnixTime(1796126400))

    assert members(json_of(X402)[1]) == members(msgspec.to_builtins(success))
    assert json_of(MPP)[2] == mpp_outcomes.receipt_json(receipt) | dict.fromkeys(
        ("channelId", "reference"), "<txid>:<vout>"
    )


def test_the_pages_name_each_member_of_a_payload() -> None:
    """The members of an opening, which has those of all others, are explained."""
    opening = vectors.ACTIONS["an opening with its funding transaction"]

    assert [name for name in x402.payload_of(opening) if f"`{name}`" not in X402] == []
    assert [name for name in mpp.payload_of(opening) if f"`{name}`" not in MPP and f'"{name}"' not in MPP] == []


def test_the_pages_name_each_code() -> None:
    """Every code of a 402 of x402, and every problem type with the refusals that have it, is in a table."""
    codes = {*x402_outcomes._CODES.values(), *x402_outcomes._GENERIC.values(), "unexpected_settle_error"}
    rows = dict(re.findall(r"(?m)^\| `([a-z/-]+)` \| (.+) \|$", MPP.partition("## Refusals")[2]))

    assert [code for code in sorted(codes) if f"`{code}`" not in X402] == []
    assert {"payment-required", "verification-failed", *mpp_outcomes._SLUGS.values()} <= set(rows)
    assert [
        code
        for code, slug in mpp_outcomes._SLUGS.items()
        if f"`{code}`" not in rows[slug] and slug != "session/channel-finalized"
    ] == []


def test_the_pages_name_each_chain_unit_and_limit() -> None:
    """The networks with their ids, the units of prices, and the longest header."""
    for word, chain in CHAINS.items():
        assert re.search(rf"\| {word}(?: \(3\))? \| `{chain}` \|", X402), word
        assert f"`{word}`" in MPP
    assert all(f"`{unit}`" in MPP for unit in UNITS)
    assert all(f"`{unit}`" in X402 for unit in UNITS if unit != "request")
    assert f"at most {MAX_HEADER_BYTES} characters" in X402
