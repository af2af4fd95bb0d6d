"""The scene for a hostile server: channels of two colluding payers and of an honest one, and the chain's outputs."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from typing import NamedTuple

from bitcoin.core import COutPoint, CTransaction, CTxIn, CTxOut
from bitcoin.core.script import CScript
from coincurve import PrivateKey

from paychan.protocol.address import key_script, p2sh_script
from paychan.protocol.kinds.base import ChannelTerms, make_terms
from paychan.protocol.types import OutPoint, UnixTime
from signer.keys.ring import hardened_keys, rbpcp_v2_keys
from tests.lib.channels import scripts_of
from tests.signer import judge

SEEDS = [sha256(b"the newest generation").digest(), sha256(b"an old one").digest()]
SOURCES = [grow(seed) for grow in (hardened_keys, rbpcp_v2_keys) for seed in SEEDS]
ADDRESS, PREVIOUS = p2sh_script(b"the operator's"), p2sh_script(b"the operator's, once")
_THIEF_KEY = PrivateKey(bytes(31) + b"\x07").public_key.format()
THIEF = key_script(_THIEF_KEY)
EXPIRY = UnixTime(1_900_000_000)
MALLORY, MALLET, ALICE = (PrivateKey(sha256(name).digest()) for name in (b"Mallory", b"Mallet", b"Alice"))


class Channel(NamedTuple):
    payer: PrivateKey
    terms: ChannelTerms
    funding_sat: int
    promised: tuple[int, ...] = ()
    """Change values of the payments that the attacker knows, if it can't make them."""

    @property
    def change_script(self) -> bytes:
        """One of the five types, which depends on the channel."""
        scripts = list(scripts_of(self.payer.public_key.format()).values())
        return scripts[self.terms.server_key[-1] % len(scripts)]


def _channel(payer: PrivateKey, source: int, number: int, funding_sat: int, *promised: int) -> Channel:
    client_key, expiry = payer.public_key.format(), UnixTime(EXPIRY + number)
    key = SOURCES[source].channel_key(client_key, expiry, create=True)
    return Channel(payer, make_terms(key.public_key, client_key, expiry), funding_sat, promised)


CHANNELS = [
    _channel(MALLORY, 0, 0, 1_000_000),
    _channel(MALLORY, 0, 1, 1_000_000),
    _channel(MALLET, 1, 0, 300_000),
    _channel(MALLET, 0, 1, 2_500),
    _channel(MALLET, 2, 2, 700),
    _channel(MALLORY, 3, 2, 50_000_000),
    _channel(ALICE, 0, 0, 500_000, 450_000, 300_000, 100_000),
    _channel(ALICE, 1, 1, 200_000, 150_000, 50_000, 0),
]
ALIEN = Channel(MALLORY, make_terms(_THIEF_KEY, MALLORY.public_key.format(), EXPIRY), 400_000)
"""A channel of another server, the attacker's: the script is right, the key is not the signer's."""

RESERVES = [SOURCES[0].reserve_key().public_key, SOURCES[1].reserve_key().public_key]


class Place(NamedTuple):
    """An output of a true transaction or an invented one; `channel` is None for coins."""

    outpoint: OutPoint
    value_sat: int
    raw: bytes
    channel: int | None = None
    reserve: int | None = None


def transaction(outputs: Sequence[tuple[int, bytes]], number: int) -> bytes:
    """A transaction with these outputs; each `number` gives another transaction."""
    spent = CTxIn(COutPoint(sha256(b"spent %d" % number).digest(), number))
    return bytes(CTransaction([spent], [CTxOut(value, CScript(script)) for value, script in outputs]).serialize())


def outpoint_of(raw: bytes, index: int) -> OutPoint:
    return OutPoint(judge.parse(raw).txid, index)


def _true_places() -> list[Place]:
    """The chain: one transaction that funds several channels and the reserve, and one for each of the others."""
    coins = [(20_000, 0), (5_000, 0), (8_000, 1)]
    first = transaction(
        [(each.funding_sat, each.terms.funding_script) for each in CHANNELS[:4]]
        + [(value, key_script(RESERVES[reserve])) for value, reserve in coins]
        + [(30_000, THIEF), (ALIEN.funding_sat, ALIEN.terms.funding_script)],
        0,
    )
    places = [Place(outpoint_of(first, index), CHANNELS[index].funding_sat, first, channel=index) for index in range(4)]
    for index, channel in enumerate(CHANNELS[4:], 4):
        raw = transaction([(9_999, THIEF), (channel.funding_sat, channel.terms.funding_script)], index)
        places.append(Place(outpoint_of(raw, 1), channel.funding_sat, raw, channel=index))
    places += [
        Place(outpoint_of(first, 4 + n), value, first, reserve=reserve) for n, (value, reserve) in enumerate(coins)
    ]
    return [
        *places,
        Place(outpoint_of(first, 8), ALIEN.funding_sat, first),
        Place(outpoint_of(first, 7), 30_000, first),
    ]


PLACES = _true_places()
ALIEN_PLACE, STOLEN_PLACE = PLACES[-2:]


def facts(address: bytes | None) -> tuple[dict[bytes, judge.Channel], frozenset[bytes], dict[bytes, bytes]]:
    """Facts on channels, reserves and keys for the judge."""
    channels, keys = {}, {key_script(key): key for key in RESERVES}
    for channel in CHANNELS:
        terms = channel.terms
        own = [source.destination_key(terms.client_key, terms.expiry.lock_time).public_key for source in SOURCES]
        keys |= {key_script(key): key for key in own}
        places = {*map(key_script, own), PREVIOUS} | ({address} if address else set())
        promised = {judge.Output(sat, channel.change_script) if sat else None for sat in channel.promised}
        known = frozenset(promised) if channel.promised else None
        channels[terms.funding_script] = judge.Channel(frozenset(places), known)
    return channels, frozenset(map(key_script, RESERVES)), keys
