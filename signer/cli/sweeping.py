"""Earnings on addresses that follow from this signer's keys: which there are, and the transaction that spends them.

An input of these addresses has a signature that does not commit to its value (that is BIP143), so a value is taken only
from the transaction that the outpoint names: a lie about it would become fee.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal, TypeAlias

from bitcoin.core import CTransaction
from bitcoin.core.serialize import SerializationError
from msgspec import Struct

from paychan.protocol.address import key_script, least_relayed_sat
from paychan.protocol.errors import Malformed, PaychanError
from paychan.protocol.kinds.base import recognise
from paychan.protocol.kinds.p2sh import parse_redeem_script
from paychan.protocol.settlement import Coin, Settlement, prepare_sweep, sweep_size
from paychan.protocol.tx import unlockings_of
from paychan.protocol.types import OutPoint, Sat, UnixTime
from signer.cli.options import CommandFailed
from signer.keys.payout import Payout
from signer.keys.ring import KeySource, SigningKey
from signer.ledger.signed import Signed

MOST_COINS = 600
"""Inputs of 148 bytes: nodes relay a transaction of up to 100,000 bytes."""


ChannelName: TypeAlias = tuple[bytes, UnixTime]
"""Client key and expiry, from which the keys of a channel follow."""


class Place(Struct, frozen=True):
    """A script that this signer's settlements pay to."""

    script: bytes
    kind: Literal["derived", "reserve", "configured"]
    channels: frozenset[ChannelName]
    """Client keys and expiries of the channels that were settled to it."""
    most_sat: Sat
    """Most that the signed settlements pay to it; of several for the same channels, one confirms."""
    groups: tuple[frozenset[OutPoint], ...] = ()
    """By channels that were settled together: the outputs to it, of which one confirms."""

    @property
    def coins(self) -> frozenset[OutPoint]:
        """All outputs to it of signed settlements."""
        return frozenset().union(*self.groups)


def places(signed: Iterable[Signed], payouts: Sequence[Payout]) -> list[Place]:
    """Group what was signed by destination, the most valuable first."""
    kinds: dict[bytes, Literal["derived", "reserve", "configured"]] = {}
    channels: dict[bytes, set[ChannelName]] = defaultdict(set)
    values: dict[bytes, dict[frozenset[OutPoint], int]] = defaultdict(dict)
    outputs: dict[bytes, dict[frozenset[OutPoint], set[OutPoint]]] = defaultdict(lambda: defaultdict(set))
    for each in signed:
        request, script = each.request, each.request.destination_script
        named = {(claim.terms.client_key, claim.terms.expiry.unix_time) for claim in request.claims}
        if request.reserve is not None and script == request.reserve.funding_script:
            kinds[script] = "reserve"
        else:
            own = any(payout.script(*channel) == script for payout in payouts for channel in named)
            kinds[script] = "configured" if own else "derived"
        channels[script] |= named
        spent = frozenset(claim.outpoint for claim in request.claims)
        values[script][spent] = max(values[script].get(spent, 0), _paid_sat(each.settlement, script))
        outputs[script][spent] |= _outputs(each.settlement, script)
    found = [
        Place(
            script,
            kind,
            frozenset(channels[script]),
            Sat(sum(values[script].values())),
            tuple(map(frozenset, outputs[script].values())),
        )
        for script, kind in kinds.items()
    ]
    return sorted(found, key=lambda place: place.most_sat, reverse=True)


def _paid_sat(settlement: Settlement | None, script: bytes) -> int:
    outputs = CTransaction.deserialize(settlement.transaction).vout if settlement else ()
    return sum(out.nValue for out in outputs if bytes(out.scriptPubKey) == script)


def _outputs(settlement: Settlement | None, script: bytes) -> set[OutPoint]:
    outputs = CTransaction.deserialize(settlement.transaction).vout if settlement else ()
    return {
        OutPoint(settlement.txid, number)
        for number, out in enumerate(outputs)
        if settlement and bytes(out.scriptPubKey) == script
    }


def is_swept(place: Place, swept: Mapping[OutPoint, str]) -> bool:
    """Say whether signed sweeps spend what each group of channels paid there."""
    return bool(place.groups) and all(group & swept.keys() for group in place.groups)


def read_sweeps(path: Path) -> dict[OutPoint, str]:
    """Read the file of signed sweeps (`signer.sweeps`): by spent coin, the txid of the newest sweep.

    A line of another form is passed over: the file is a note for the operator, and protects nothing.
    """
    spent: dict[OutPoint, str] = {}
    with suppress(OSError):
        for line in path.read_bytes().splitlines():
            with suppress(ValueError, KeyError, TypeError, PaychanError):
                about = json.loads(line)
                for name in about["spends"]:
                    spent[OutPoint.parse(*_split(name))] = str(about["txid"])
    return spent


def keys_of(channels: Iterable[ChannelName], sources: Sequence[KeySource], *, reserve: bool) -> dict[bytes, SigningKey]:
    """Return the keys of these channels' addresses by script, and with `reserve` those of the reserve.

    Raises:
        KeysFailed: the token does not answer.
    """
    keys = [key for channel in channels for source in sources if (key := source.destination_key(*channel)) is not None]
    if reserve:
        keys += [source.reserve_key() for source in sources]
    return {key_script(key.public_key): key for key in keys}


class Listed(Struct, frozen=True):
    """A coin of the operator's list, as the transaction shows it that its outpoint names."""

    coin: Coin
    script: bytes
    channels: frozenset[ChannelName]
    """The channels that this transaction settles: one of them has the key, also when the ledger is lost."""


def read_coins(text: str, signed: Iterable[Signed]) -> list[Listed]:
    """Read lines `TXID:VOUT TRANSACTION`; each transaction must have the named txid.

    The transaction, in hex, may be left out where this signer signed it.

    Raises:
        CommandFailed: a line of another form, or without a transaction that proves the value.
    """
    own = {each.settlement.txid: each.settlement.transaction for each in signed if each.settlement}
    coins = {}
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split("#")[0].split()
        if not words:
            continue
        try:
            outpoint = OutPoint.parse(*_split(words[0]))
            raw = bytes.fromhex(words[1]) if len(words) > 1 else own.get(outpoint.txid, b"")
            coins[outpoint] = _listed(outpoint, raw)
        except (ValueError, SerializationError, PaychanError) as error:
            msg = f"line {number}, {words[0][:70]}: {error}"
            raise CommandFailed(msg) from None
    return list(coins.values())


def _listed(outpoint: OutPoint, raw: bytes) -> Listed:
    """Read an output out of the transaction that proves it. Raises ValueError, `SerializationError`."""
    if not raw:
        msg = "this signer has not signed that transaction: put its hex digits behind the outpoint"
        raise ValueError(msg)
    transaction = CTransaction.deserialize(raw)
    if bytes(transaction.GetTxid()) != outpoint.txid or outpoint.vout >= len(transaction.vout):
        msg = "the transaction behind it has another txid, or no such output"
        raise ValueError(msg)
    output = transaction.vout[outpoint.vout]
    return Listed(
        Coin(outpoint, Sat(output.nValue)), bytes(output.scriptPubKey), frozenset(_settled_channels(transaction))
    )


def _settled_channels(transaction: CTransaction) -> Iterator[ChannelName]:
    """Read client key and expiry out of each input that spends a channel's output."""
    for unlocking in unlockings_of(transaction):
        spend = recognise(unlocking)
        with suppress(Malformed):
            if spend is not None:
                terms = parse_redeem_script(spend.script)
                yield terms.client_key, terms.expiry.unix_time


def _split(text: str) -> tuple[str, int]:
    txid, _, vout = text.partition(":")
    if not (vout.isascii() and vout.isdigit()):
        msg = "want TXID:VOUT"
        raise ValueError(msg)
    return txid, int(vout)


class Sweep(Struct, frozen=True):
    """A transaction that spends coins of this signer's keys to one script."""

    coins: tuple[tuple[Coin, SigningKey], ...]
    script: bytes
    fee_sat: Sat
    size: int

    @property
    def value_sat(self) -> Sat:
        return Sat(sum(coin.value_sat for coin, _ in self.coins))

    async def sign(self) -> Settlement:
        """Sign each input with SIGHASH_ALL. Raises `KeysFailed`."""
        unsigned = prepare_sweep([(coin, key.public_key) for coin, key in self.coins], self.script, self.fee_sat)
        signatures = [await key.sign(digest) for (_, key), digest in zip(self.coins, unsigned.digests, strict=True)]
        return unsigned.signed(signatures)


def plan(listed: Iterable[Listed], keys: Mapping[bytes, SigningKey], script: bytes, fee_rate: int) -> Sweep:
    """Choose the coins that these keys can spend, the most valuable first, and compute the fee.

    Raises:
        CommandFailed: none, or the fee would take more than half of them.
    """
    own = sorted(((each.coin, keys[each.script]) for each in listed if each.script in keys), key=_by_value)
    chosen = tuple(own[:MOST_COINS])
    if not chosen:
        msg = "none of these coins is on an address that this signer derived"
        raise CommandFailed(msg)
    size = sweep_size([key.public_key for _, key in chosen], script)
    sweep = Sweep(chosen, script, Sat(fee_rate * size), size)
    if sweep.value_sat - sweep.fee_sat < max(least_relayed_sat(script), sweep.fee_sat):
        msg = f"the fee of {sweep.fee_sat} sat takes more than half of {sweep.value_sat} sat: lower --fee-rate, or wait"
        raise CommandFailed(msg)
    return sweep


def _by_value(each: tuple[Coin, SigningKey]) -> int:
    return -each[0].value_sat
