"""The server's keys: finds the key of a channel, and signs with it. No private key is ever shown or logged.

Policies and handlers use `KeyRing` only. It holds generations of keys, the newest first: a new channel gets a key of
the newest, an old one is settled with its original key. A generation is a `KeySource`: the trees of a seed and the
debug key are here, a hardware module is in `signer.token`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from hashlib import sha256
from typing import NamedTuple, Protocol

from coincurve import PrivateKey

from paychan.protocol.address import key_script
from paychan.protocol.certificate import certificate_digest, tagged_hash
from paychan.protocol.keytree import HARDENED, Node
from paychan.protocol.kinds.base import ChannelTerms
from paychan.protocol.types import UnixTime
from signer.keys.payout import Fixed, Payout

DEBUG_KEY = bytes.fromhex("9b4b4cf8f8796ca8a3a8a3da5c73deeb7c558a89e3752b896349ec58c010879d")
"""RBPCP §9.1: "That debug key is public knowledge". `config` refuses it outside debug, `seed` refuses it as a seed."""

CHANNEL_BRANCH = int.from_bytes(b"pchk", "big") | HARDENED
"""First level of the hardened tree's channel keys: m/"pchk"'/w1'/w2'/w3'/w4'."""

DESTINATION_BRANCH = int.from_bytes(b"pchd", "big") | HARDENED
"""First level of the tree's destinations. One level deeper than RBPCP §9.2's m/w1'/w2'/w3'/w4': no collision."""

RESERVE_PATH = (int.from_bytes(b"pchr", "big") | HARDENED, HARDENED)
"""The reserve's one key, in both trees: m/"pchr"'/0'. Only the identity key is at depth 2, too: no collision."""

IDENTITY_PATH = (int.from_bytes(b"pchi", "big") | HARDENED, HARDENED)
"""The server's identity key, in both trees: m/"pchi"'/0'."""

CACHED_CHILDREN = 10_000
"""Most cached children: a derivation takes 0.06 ms (0.2 ms if not hardened), a signature 0.03 ms; a cached child takes about a kilobyte."""


_own_script = lru_cache(CACHED_CHILDREN)(key_script)


class KeysFailed(Exception):
    """The key store can't answer now, with the reason; the caller may try again."""


class SigningKey(Protocol):
    """A key pair of this signer."""

    @property
    def public_key(self) -> bytes:
        """Compressed, 33 bytes."""

    async def sign(self, digest: bytes) -> bytes:
        """Sign 32 bytes: strict DER, low S. May take any time. Raises `KeysFailed`."""


class KeySource(Protocol):
    """One generation of keys. All methods raise `KeysFailed`, and none blocks: the event loop calls them.

    Client keys are compressed points and expiries are times that fit nLockTime: `handler` and `validation` have checked
    both.
    """

    def channel_key(self, client_key: bytes, expiry: UnixTime, *, create: bool) -> SigningKey | None:
        """Return the key of a channel. `create`: make one if there is none."""

    def destination_key(self, client_key: bytes, expiry: UnixTime) -> SigningKey | None:
        """Return the key that a channel's settlement pays to, if the operator configured no address."""

    def reserve_key(self) -> SigningKey:
        """Return the key of the reserve, whose coins help to pay fees of settlements."""

    def identity_key(self) -> SigningKey:
        """Return the server's identity key. It is no other key of this source, and `KeyRing.certify` alone uses it."""


class Destination(NamedTuple):
    """A script that settlements may pay to, and its key, unless only the operator has it.

    `retired`: it was replaced, so only settlements that were signed for it before may still pay to it.
    """

    script: bytes
    key: SigningKey | None = None
    retired: bool = False


class KeyRing:
    """The keys of all generations, and the addresses that the operator configured."""

    __slots__ = ("_current", "_previous", "_sources")

    def __init__(
        self,
        sources: Sequence[KeySource],
        payout: Payout | bytes | None = None,
        previous: Sequence[Payout | bytes] = (),
    ) -> None:
        """Take generations, the newest first, and places or scriptPubKeys; without `payout`, destinations are derived."""
        self._sources = tuple(sources)
        self._current = () if payout is None else (_place(payout),)
        self._previous = tuple(_place(each) for each in previous)

    def new(self, client_key: bytes, expiry: UnixTime) -> SigningKey:
        """Return the key for a channel that is about to be opened. Raises `KeysFailed`."""
        key = self._sources[0].channel_key(client_key, expiry, create=True)
        if key is None:
            msg = "no key for a new channel"
            raise KeysFailed(msg)
        return key

    def others(self, client_key: bytes, expiry: UnixTime) -> list[bytes]:
        """Return the public keys that earlier generations have for a channel; makes no key. Raises `KeysFailed`."""
        keys = (source.channel_key(client_key, expiry, create=False) for source in self._sources)
        found = list(dict.fromkeys(key.public_key for key in keys if key is not None))
        newest = self._sources[0].channel_key(client_key, expiry, create=False)
        return [key for key in found if newest is None or key != newest.public_key]

    def find(self, terms: ChannelTerms) -> SigningKey | None:
        """Return the signer's key that these terms name, of any generation. Raises `KeysFailed`."""
        for source in self._sources:
            key = source.channel_key(terms.client_key, terms.expiry.unix_time, create=False)
            if key is not None and key.public_key == terms.server_key:
                return key
        return None

    def destinations(self, client_key: bytes, expiry: UnixTime) -> Iterator[Destination]:
        """Yield the allowed destinations of a channel's settlement, the preferred one first. Raises `KeysFailed`."""
        for payout in self._current:
            yield Destination(payout.script(client_key, expiry))
        retired = bool(self._current)
        for source in self._sources:
            key = source.destination_key(client_key, expiry)
            if key is not None:
                yield Destination(_own_script(key.public_key), key, retired)
                retired = True
        for payout in self._previous:
            yield Destination(payout.script(client_key, expiry), retired=True)

    def reserve(self) -> SigningKey:
        """Return the key of the reserve's coins. Raises `KeysFailed`."""
        return self._sources[0].reserve_key()

    def identity(self) -> bytes:
        """Return the server's identity key (33 bytes), that of the newest generation. Raises `KeysFailed`."""
        return self._sources[0].identity_key().public_key

    async def certify(self, receipt_key: bytes, not_before: UnixTime, not_after: UnixTime) -> bytes:
        """Sign the certificate of a receipt key: the identity key signs nothing else. Raises `KeysFailed`."""
        return await self._sources[0].identity_key().sign(certificate_digest(receipt_key, not_before, not_after))

    def find_reserve(self, public_key: bytes) -> Destination | None:
        """Return the reserve with this public key, of any generation. Raises `KeysFailed`."""
        keys = [source.reserve_key() for source in self._sources]
        found = next((key for key in keys if key.public_key == public_key), None)
        if found is None:
            return None
        return Destination(key_script(public_key), found, retired=public_key != keys[0].public_key)


def _place(payout: Payout | bytes) -> Payout:
    return Fixed(payout) if isinstance(payout, bytes) else payout


class SoftKey:
    """A key in this process's memory."""

    __slots__ = ("_key", "public_key")

    def __init__(self, key: PrivateKey) -> None:
        self._key = key
        self.public_key = key.public_key.format()

    async def sign(self, digest: bytes) -> bytes:
        """Deterministic (RFC 6979)."""
        return self._key.sign(digest, hasher=None)


class StaticKey:
    """One key for all channels, as in v1 (RBPCP §9.1), and for the reserve. Needs a configured destination.

    The identity key is another one, which follows from it.
    """

    __slots__ = ("_identity_key", "_key")

    def __init__(self, secret: bytes) -> None:
        self._key = SoftKey(PrivateKey(secret))
        self._identity_key = SoftKey(PrivateKey(tagged_hash("paychan/static-identity", secret)))

    def channel_key(self, client_key: bytes, expiry: UnixTime, *, create: bool) -> SigningKey:  # noqa: ARG002 - one key
        return self._key

    def destination_key(self, client_key: bytes, expiry: UnixTime) -> None:
        """The operator always configures the destination."""

    def reserve_key(self) -> SigningKey:
        return self._key

    def identity_key(self) -> SigningKey:
        return self._identity_key


def channel_words(client_key: bytes, expiry: UnixTime) -> list[int]:
    """RBPCP §9.2: the first four words of SHA256(E ‖ C), bit 31 of each cleared."""
    digest = sha256(expiry.to_bytes(4, "big") + client_key).digest()
    return [int.from_bytes(digest[i : i + 4], "big") & ~HARDENED for i in range(0, 16, 4)]


class TreeKeys:
    """A key and a destination per channel, the reserve's key and the identity key, derived from one seed."""

    __slots__ = ("_channel_key", "_destination_key", "_identity_key", "_reserve_key")

    def __init__(
        self,
        channel_node: Callable[[bytes, UnixTime], Node],
        destination_node: Callable[[bytes, UnixTime], Node],
        reserve_node: Node,
        identity_node: Node,
    ) -> None:
        self._channel_key = lru_cache(CACHED_CHILDREN)(_key_of(channel_node))
        self._destination_key = lru_cache(CACHED_CHILDREN)(_key_of(destination_node))
        self._reserve_key = SoftKey(reserve_node.key)
        self._identity_key = SoftKey(identity_node.key)

    def channel_key(self, client_key: bytes, expiry: UnixTime, *, create: bool) -> SigningKey:  # noqa: ARG002 - derived
        return self._channel_key(client_key, expiry)

    def destination_key(self, client_key: bytes, expiry: UnixTime) -> SigningKey:
        return self._destination_key(client_key, expiry)

    def reserve_key(self) -> SigningKey:
        return self._reserve_key

    def identity_key(self) -> SigningKey:
        return self._identity_key


def hardened_keys(seed: bytes) -> TreeKeys:
    """Hardened keys: none reveals anything about another."""
    root = Node.from_seed(seed)
    channels, destinations = root.child(CHANNEL_BRANCH), root.child(DESTINATION_BRANCH)
    return TreeKeys(
        _hardened_below(channels),
        _hardened_below(destinations),
        root.descend(RESERVE_PATH),
        root.descend(IDENTITY_PATH),
    )


def rbpcp_v2_keys(seed: bytes) -> TreeKeys:
    """Keys as RBPCP §9.2 derives them.

    "with non-hardened derivation, one leaked child private key plus the xpub reveals the root key": the signer never
    sends an xpub.
    """
    root = Node.from_seed(seed)

    def channel_node(client_key: bytes, expiry: UnixTime) -> Node:
        return root.descend(channel_words(client_key, expiry))

    return TreeKeys(channel_node, _hardened_below(root), root.descend(RESERVE_PATH), root.descend(IDENTITY_PATH))


def _hardened_below(node: Node) -> Callable[[bytes, UnixTime], Node]:
    def derive(client_key: bytes, expiry: UnixTime) -> Node:
        return node.descend([word | HARDENED for word in channel_words(client_key, expiry)])

    return derive


def _key_of(derive: Callable[[bytes, UnixTime], Node]) -> Callable[[bytes, UnixTime], SoftKey]:
    def key(client_key: bytes, expiry: UnixTime) -> SoftKey:
        return SoftKey(derive(client_key, expiry).key)

    return key
