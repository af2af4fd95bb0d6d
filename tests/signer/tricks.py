"""Faults of a request other than amounts and places: each function changes one part of a valid request."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256

from paychan.protocol.kinds.base import ChannelTerms
from paychan.protocol.payment import Payment
from paychan.protocol.settlement import Claim, Coin, Reserve
from paychan.protocol.types import OutPoint, Sat
from paychan.protocol.wire.signer_messages import FundingRequest, SettlementRequest
from tests.signer.hostile import Attacker
from tests.signer.judge import parse
from tests.signer.messages import mutated
from tests.signer.scene import (
    ALIEN,
    ALIEN_PLACE,
    CHANNELS,
    EXPIRY,
    PLACES,
    RESERVES,
    STOLEN_PLACE,
    THIEF,
    Place,
    transaction,
)

Trick = Callable[[Attacker, SettlementRequest, int], SettlementRequest]


def _claims(make: Callable[[tuple[Claim, ...]], tuple[Claim, ...]]) -> Trick:
    return lambda _, request, __: mutated(request, "claims", make(request.claims))


def _claim(make: Callable[[Attacker, Claim, int], Claim]) -> Trick:
    """Change one of the claims."""

    def apply(attacker: Attacker, request: SettlementRequest, number: int) -> SettlementRequest:
        index = number % len(request.claims)
        return mutated(request, f"claims.{index}", make(attacker, request.claims[index], number))

    return apply


def _unsigned(path: str, make: Callable[[Claim, int], object]) -> Trick:
    """Change a part of a claim without its payer's signature."""
    return _claim(lambda _, claim, number: mutated(claim, path, make(claim, number)))


def _signed(**make: Callable[[Claim, int], object]) -> Trick:
    """Change parts of a claim, and have them signed if the payer colludes."""
    return _claim(
        lambda attacker, claim, number: attacker.signs(
            claim, **{name: each(claim, number) for name, each in make.items()}
        )
    )


def _coins(make: Callable[[tuple[Coin, ...], int], tuple[Coin, ...]]) -> Trick:
    """Change the coins of a request that has some."""

    def apply(attacker: Attacker, request: SettlementRequest, number: int) -> SettlementRequest:
        if request.reserve is None or not request.reserve.coins:
            return request
        return mutated(request, "reserve.coins", make(request.reserve.coins, number))

    return apply


def _terms(number: int) -> ChannelTerms:
    return CHANNELS[number % len(CHANNELS)].terms


def _place(number: int) -> Place:
    return PLACES[number % len(PLACES)]


def _as_coin(place: Place) -> tuple[Coin, ...]:
    return (Coin(place.outpoint, Sat(place.value_sat)),)


def _twice_with_change(attacker: Attacker, request: SettlementRequest, number: int) -> SettlementRequest:
    place = attacker.places[number % len(attacker.places)]
    return mutated(request, "claims", (*request.claims, attacker.claim(place, "newer")))


def _borrowed(attacker: Attacker, claim: Claim, number: int) -> Claim:
    other = attacker.claim(PLACES[number % len(CHANNELS)], "newer").payment.signature
    return mutated(claim, "payment.signature", other)


def _another_servers(attacker: Attacker, request: SettlementRequest, number: int) -> SettlementRequest:
    claim = Claim(
        ALIEN.terms, ALIEN_PLACE.outpoint, Sat(ALIEN.funding_sat), ALIEN.change_script, Payment(Sat(0), bytes(8), 0)
    )
    return mutated(request, "claims", (*request.claims, attacker.signs(claim)))


def _other_reserve(attacker: Attacker, request: SettlementRequest, number: int) -> SettlementRequest:
    key = (*RESERVES, _terms(number).server_key, _terms(number).client_key)[number % 4]
    coins = request.reserve.coins if request.reserve else ()
    reserve = Reserve(key, coins)
    return mutated(mutated(request, "reserve", reserve), "destination_script", reserve.funding_script)


TRICKS: dict[str, Trick] = {
    "reversed": _claims(lambda claims: claims[::-1]),
    "twice": _claims(lambda claims: claims * 2),
    "none": _claims(lambda _: ()),
    "too many": _claims(lambda claims: claims * 201),
    "two with change": _twice_with_change,
    "at another output": _signed(
        outpoint=lambda _, n: _place(n).outpoint, funding_sat=lambda _, n: Sat(_place(n).value_sat)
    ),
    "at no output": _signed(outpoint=lambda _, n: OutPoint(sha256(b"%d" % n).digest(), n)),
    "other terms": _signed(terms=lambda _, n: _terms(n)),
    "other server key": _signed(terms=lambda claim, n: mutated(claim.terms, "server_key", _terms(n).server_key)),
    "payer's key twice": _signed(terms=lambda claim, _: mutated(claim.terms, "server_key", claim.terms.client_key)),
    "other expiry": _signed(terms=lambda claim, n: mutated(claim.terms, "expiry.lock_time", EXPIRY + n % 9)),
    "holds less": _signed(funding_sat=lambda claim, n: claim.funding_sat - 1 - n % 1_000),
    "holds much less": _signed(funding_sat=lambda claim, _: claim.payment.change_sat + claim.received_sat // 8),
    "holds more": _signed(funding_sat=lambda claim, n: claim.funding_sat + 1 + n * n),
    "other flag": _unsigned("payment.flag", lambda _, n: (0, 1, 2, 3, 0x81, 0x82, 0x83)[n % 7]),
    "more change": _unsigned("payment.change_sat", lambda claim, n: claim.payment.change_sat + n % 9 + 1),
    "less change": _unsigned("payment.change_sat", lambda claim, n: claim.payment.change_sat - n % 9 - 1),
    "other signature": _claim(_borrowed),
    "other script": _signed(change_script=lambda *_: THIEF),
    "other script, unsigned": _unsigned("change_script", lambda *_: THIEF),
    "change to an unrelayed script": _signed(change_script=lambda *_: b"\x6a" + THIEF[1:]),
    "change to witness": _signed(change_script=lambda *_: b"\x00\x14" + THIEF[3:23]),
    "coins twice": _coins(lambda coins, _: coins * 2),
    "coin holds less": _coins(lambda coins, n: mutated(coins, "0.value_sat", max(1, coins[0].value_sat - n))),
    "coin holds more": _coins(lambda coins, n: mutated(coins, "0.value_sat", coins[0].value_sat + n)),
    "claim as coin": _coins(lambda coins, n: (*coins, *_as_coin(_place(n)))[:4]),
    "stolen coin": _coins(lambda coins, _: coins + _as_coin(STOLEN_PLACE)),
    "other reserve": _other_reserve,
    "another server's": _another_servers,
}

DAMAGES = ["value", "script", "witness", "more", "less", "index", "negative index", "foreign"]
SOUND = ["none", "value", "script"]
"""Damages that leave a possible transaction."""


def damaged(request: FundingRequest, damage: str, number: int) -> FundingRequest:
    """Show a transaction in other bytes, a missing output, or an output that is neither a channel's nor a coin."""
    raw, [vout] = request.transaction, request.outputs
    output = parse(raw).outputs[vout]
    at = raw.index(output.value_sat.to_bytes(8, "little") + bytes([len(output.script)]) + output.script)
    spoilt = at + 12 * (damage == "script")  # a byte of the hash that it pays to
    changes = {
        "value": raw[:spoilt] + bytes([raw[spoilt] ^ 1]) + raw[spoilt + 1 :],
        "script": raw[:spoilt] + bytes([raw[spoilt] ^ 1]) + raw[spoilt + 1 :],
        "witness": raw[:4] + b"\x00\x01" + raw[4:-4] + b"\x01\x01\x00" + raw[-4:],
        "more": raw + bytes([number % 256]),
        "less": raw[:-1],
        "foreign": transaction([(number + 1, b"\x6a")], number),
    }
    outputs = {"index": vout + 99, "negative index": vout - 99, "foreign": 0}
    return FundingRequest(1, changes.get(damage, raw), (outputs.get(damage, vout),))
