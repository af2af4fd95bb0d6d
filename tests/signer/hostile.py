"""Requests of a hostile server: valid except for one chosen fault.

The server knows all public facts of `scene`, and can sign as the payers that collude with it. A `Plan` names the fault
in names and small numbers; `Attacker` makes the request.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import msgspec
from hypothesis import strategies as st

from paychan.protocol.address import key_script
from paychan.protocol.payment import sign_payment
from paychan.protocol.settlement import Claim, Coin, Reserve, received_sat, settlement_size
from paychan.protocol.types import OutPoint, Sat
from paychan.protocol.wire.signer_messages import SettlementRequest
from signer.keys.ring import KeyRing
from tests.signer import judge
from tests.signer.messages import mutated
from tests.signer.scene import (
    ADDRESS,
    CHANNELS,
    MALLET,
    MALLORY,
    PLACES,
    PREVIOUS,
    RESERVES,
    THIEF,
    Channel,
    Place,
    outpoint_of,
    transaction,
)


class Plan(NamedTuple):
    """A request to try. Numbers select among the available items, modulo their count."""

    places: list[int]
    change: str
    destination: str
    fee: str
    coins: list[int] | None
    number: int


def _often(usual: str, *others: str) -> st.SearchStrategy[str]:
    return st.sampled_from([usual] * (4 * len(others)) + list(others))


DESTINATIONS = [
    "current",
    "derived",
    "old",
    "previous",
    "reserve",
    "thief",
    "payer",
    "server key",
    "channel",
    "nowhere",
]
_PLACES = st.lists(st.integers(0, 15), min_size=1, max_size=3)
_COINS = st.none() | st.lists(st.integers(0, 3), max_size=2)
NUMBERS = st.integers(0, 1 << 16)

PLANS = st.builds(
    Plan,
    places=_PLACES,
    change=_often("newer", "newest", "drained", "all", "older", "least"),
    destination=_often("right", *DESTINATIONS),
    fee=_often("dearer", "same rate", "most", "more", "all", "more than all", "none", "negative", "burnt"),
    coins=_COINS,
    number=NUMBERS,
)
"""Most parts of a plan are right most of the time."""

GOOD = st.builds(Plan, _PLACES, st.just("newer"), st.just("right"), st.just("dearer"), _COINS, NUMBERS)
"""Plans whose requests are signed, unless the places are bad."""


class Attacker:
    """Makes requests from plans, and uses earlier replies."""

    def __init__(self, keys: KeyRing, rules: judge.Rules) -> None:
        self.keys, self.rules = keys, rules
        self.places = [place for place in PLACES if place.channel is not None]
        self.coins = [place for place in PLACES if place.reserve is not None]
        self.signed: dict[OutPoint, SettlementRequest] = {}
        self.raw: dict[OutPoint, bytes] = {}
        self.shown: dict[OutPoint, Sat] = {}
        """Change of the newest payments that the signer was shown."""

    def signed_for(self, request: SettlementRequest, raw: bytes) -> None:
        """Record a success."""
        self.signed |= {claim.outpoint: request for claim in request.claims}
        self.raw |= {claim.outpoint: raw for claim in request.claims}

    def newest(self, number: int) -> SettlementRequest:
        """One of the requests that were signed last."""
        return list(self.signed.values())[number % len(self.signed)]

    def came_back(self, request: SettlementRequest) -> Place | None:
        """Take the output that a settlement pays to the reserve: from now on it is a coin."""
        raw, reserve = self.raw[request.claims[0].outpoint], request.reserve
        outputs = judge.parse(raw).outputs
        if reserve is None or outputs[-1].script != reserve.funding_script:
            return None
        place = Place(
            outpoint_of(raw, len(outputs) - 1), outputs[-1].value_sat, raw, None, RESERVES.index(reserve.public_key)
        )
        self.coins.append(place)
        return place

    def invent(self, channel: int, value_sat: int, number: int) -> Place:
        """Pay any value to a channel's script, in a transaction that no chain can contain."""
        raw = transaction([(value_sat, CHANNELS[channel].terms.funding_script)], 1_000 + number)
        place = Place(outpoint_of(raw, 0), value_sat, raw, channel=channel)
        self.places.append(place)
        return place

    def request(self, plan: Plan) -> SettlementRequest:
        """Make the request of a plan."""
        places = {self.places[number % len(self.places)].outpoint: number for number in plan.places}
        first, *others = (self.claim(self.places[number % len(self.places)], plan.change) for number in places.values())
        drained = [claim for claim in map(self._drained, others) if claim is not None]
        reserve = None if plan.coins is None else self._reserve(plan.coins)
        script = self._destination(plan.destination, first, reserve, plan.number)
        request = SettlementRequest(plan.number, (first, *drained), script, Sat(0), reserve)
        return msgspec.structs.replace(request, fee_sat=Sat(self.fee(plan.fee, request)))

    def fee(self, name: str, request: SettlementRequest) -> int:
        """A fee of this name for a request that is valid otherwise."""
        size, received = _size(request), received_sat(request.claims)
        share = min(received * self.rules.fee_percent // 100, self.rules.fee_sat, size * self.rules.fee_sat_per_vb)
        most = min(max(share, size + judge.RELAYED_AND_DUST), received)
        least = 1
        for before in (self.signed.get(claim.outpoint) for claim in request.claims):
            least = max(least, before.fee_sat * size // _size(before) + 1 if before else 1)
        coins = request.reserve.value_sat if request.reserve else 0
        fees = {"same rate": least - 1, "most": most, "more": most + 1, "all": received, "more than all": received + 1}
        return {**fees, "none": 0, "negative": -1, "burnt": received + coins}.get(name, max(least, min(size, most)))

    def signs(self, claim: Claim, more_sat: int = 0, **changes: object) -> Claim:
        """Change a claim, and let its payer sign it with more or less change, if the payer colludes."""
        claim = msgspec.structs.replace(claim, **changes)
        key = _COLLUDING.get(claim.terms.client_key)
        if key is None:
            return claim
        change_sat = Sat(max(0, claim.payment.change_sat + more_sat))
        payment = sign_payment(key, claim.terms, claim.outpoint, claim.funding_sat, claim.change_script, change_sat)
        return msgspec.structs.replace(claim, payment=payment)

    def claim(self, place: Place, change: str) -> Claim:
        """Claim an output; an honest payer's output by its payment with the nearest change."""
        channel = CHANNELS[place.channel or 0]
        before = self.signed.get(place.outpoint)
        claims = before.claims if before else ()
        newest = next((c.payment.change_sat for c in claims if c.outpoint == place.outpoint), place.value_sat * 2 // 3)
        newest = min(newest, self.shown.get(place.outpoint, newest))
        wanted = {"newest": newest, "drained": 0, "all": place.value_sat, "older": newest + 1, "least": 1}
        sat = wanted.get(change, newest * 3 // 4)
        if channel.promised:
            sat = min(channel.promised, key=lambda promised: abs(promised - sat))
        payment = sign_payment(
            channel.payer,
            channel.terms,
            _signed_at(channel, place.outpoint),
            Sat(place.value_sat),
            channel.change_script,
            Sat(sat),
        )
        return Claim(channel.terms, place.outpoint, Sat(place.value_sat), channel.change_script, payment)

    def _drained(self, claim: Claim) -> Claim | None:
        """The claim with no change for the payer; None if an honest payer has not signed that."""
        channel = next(channel for channel in CHANNELS if channel.terms == claim.terms)
        if channel.promised and 0 not in channel.promised:
            return None
        at = _signed_at(channel, claim.outpoint)
        return mutated(
            claim,
            "payment",
            sign_payment(channel.payer, claim.terms, at, claim.funding_sat, claim.change_script, Sat(0)),
        )

    def _reserve(self, numbers: Sequence[int]) -> Reserve:
        coins = [self.coins[number % len(self.coins)] for number in dict.fromkeys(numbers)]
        of = coins[0].reserve or 0 if coins else 0
        same = dict.fromkeys(coin for coin in coins if coin.reserve == of)
        return Reserve(RESERVES[of], tuple(Coin(coin.outpoint, Sat(coin.value_sat)) for coin in same))

    def _destination(self, name: str, claim: Claim, reserve: Reserve | None, number: int) -> bytes:
        own = [each.script for each in self.keys.destinations(claim.terms.client_key, claim.terms.expiry.lock_time)]
        right = own[0] if reserve is None else reserve.funding_script
        other = CHANNELS[number % len(CHANNELS)].terms
        scripts = {"current": ADDRESS, "derived": own[-3], "old": own[-2], "previous": PREVIOUS, "thief": THIEF}
        scripts |= {"reserve": key_script(RESERVES[number % 2]), "payer": claim.change_script, "nowhere": b""}
        scripts |= {"server key": key_script(claim.terms.server_key), "channel": other.funding_script}
        return scripts.get(name, right)


def _signed_at(channel: Channel, outpoint: OutPoint) -> OutPoint:
    """An honest payer has signed only for its true funding output."""
    return PLACES[CHANNELS.index(channel)].outpoint if channel.promised else outpoint


def _size(request: SettlementRequest) -> int:
    available = received_sat(request.claims) + (request.reserve.value_sat if request.reserve else 0)
    server_output = request.fee_sat < available or not request.claims[0].payment.change_sat
    return settlement_size(
        request.claims, request.destination_script, server_output=server_output, reserve=request.reserve
    )


_COLLUDING = {key.public_key.format(): key for key in (MALLORY, MALLET)}
