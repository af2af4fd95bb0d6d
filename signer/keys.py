"""The server's keys: which one belongs to a channel, and signing with it. Nothing here is ever shown or logged.

`Keys` is all that policies and handlers know of a key store. A hardware module (PKCS#11) will be one more
implementation of it: such a module has no BIP32, so it will keep its own key per channel.

BIP32 is written out below because the `bip32` package pins an old coincurve; it is checked with the vectors of BIP32.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Sequence
from functools import lru_cache
from hashlib import sha256
from typing import Protocol

from coincurve import PrivateKey

from paychan.protocol.address import key_script
from paychan.protocol.types import UnixTime

DEBUG_KEY = bytes.fromhex("9b4b4cf8f8796ca8a3a8a3da5c73deeb7c558a89e3752b896349ec58c010879d")
"""PROTOCOL §9.1: "That debug key is public knowledge". `config` refuses it outside debug, `seed` refuses it as seed."""

HARDENED = 1 << 31
"""BIP32: indices from here on derive hardened children, which a leaked sibling and the public parent don't reveal."""

CHANNEL_BRANCH = int.from_bytes(b"pchk", "big") | HARDENED
"""First level of the hardened tree's channel keys: m/"pchk"'/w1'/w2'/w3'/w4'."""

DESTINATION_BRANCH = int.from_bytes(b"pchd", "big") | HARDENED
"""First level of its destinations. One level deeper than PROTOCOL §9.2's m/w1'/w2'/w3'/w4': the trees can't meet."""

RESERVE_PATH = (int.from_bytes(b"pchr", "big") | HARDENED, HARDENED)
"""The reserve's one key, in both trees: m/"pchr"'/0'. No other key of ours is at depth 2: it can't meet them."""

CACHED_CHILDREN = 10_000
"""A derivation costs 0.2 ms, a signature 0.03; a child kept costs about a kilobyte."""


class Keys(Protocol):
    """Client keys are compressed points and expiries times that fit nLockTime: `policy.channel_terms` has checked."""

    def public_key(self, client_key: bytes, expiry: UnixTime) -> bytes:
        """Return the server key (33 bytes) of the channel of this client key and expiry."""

    def destination_script(self, client_key: bytes, expiry: UnixTime) -> bytes:
        """Return the one scriptPubKey that this channel's settlement may pay the server to."""

    def sign(self, client_key: bytes, expiry: UnixTime, digest: bytes) -> bytes:
        """Sign 32 bytes with that server key: strict DER, low S, RFC 6979."""

    def destination_key(self, client_key: bytes, expiry: UnixTime) -> bytes | None:
        """Return the public key behind `destination_script`; None where the operator configured an address."""

    def sign_destination(self, client_key: bytes, expiry: UnixTime, digest: bytes) -> bytes:
        """Sign 32 bytes with the key behind `destination_key`, which must not be None."""

    def reserve_key(self) -> bytes:
        """Return the public key of the coins that help to pay for settlements."""

    def sign_reserve(self, digest: bytes) -> bytes:
        """Sign 32 bytes with that key."""


class StaticKey:
    """One key for all channels, as in v1 (PROTOCOL §9.1), and for the reserve."""

    __slots__ = ("_destination", "_key")

    def __init__(self, secret: bytes, destination: bytes) -> None:
        self._key = PrivateKey(secret)
        self._destination = destination

    def public_key(self, client_key: bytes, expiry: UnixTime) -> bytes:  # noqa: ARG002 - the same for all
        return self._key.public_key.format()

    def destination_script(self, client_key: bytes, expiry: UnixTime) -> bytes:  # noqa: ARG002
        return self._destination

    def sign(self, client_key: bytes, expiry: UnixTime, digest: bytes) -> bytes:  # noqa: ARG002
        return self._key.sign(digest, hasher=None)

    def destination_key(self, client_key: bytes, expiry: UnixTime) -> None:
        """The destination is always the operator's."""

    def sign_destination(self, client_key: bytes, expiry: UnixTime, digest: bytes) -> bytes:
        raise NotImplementedError

    def reserve_key(self) -> bytes:
        return self._key.public_key.format()

    def sign_reserve(self, digest: bytes) -> bytes:
        return self._key.sign(digest, hasher=None)


class Node:
    """A BIP32 node: private key and chain code."""

    __slots__ = ("chain_code", "key")

    def __init__(self, key: PrivateKey, chain_code: bytes) -> None:
        self.key = key
        self.chain_code = chain_code

    @classmethod
    def from_seed(cls, seed: bytes) -> Node:
        """Make the master node."""
        digest = hmac.digest(b"Bitcoin seed", seed, "sha512")
        return cls(PrivateKey(digest[:32]), digest[32:])

    def child(self, index: int) -> Node:
        """Derive one level.

        Raises:
            ValueError: BIP32's "in case parse256(IL) >= n or ki = 0", which happens once in 2^127.
        """
        parent = b"\x00" + self.key.secret if index >= HARDENED else self.key.public_key.format()
        digest = hmac.digest(self.chain_code, parent + index.to_bytes(4, "big"), "sha512")
        return Node(self.key.add(digest[:32]), digest[32:])

    def descend(self, path: Sequence[int]) -> Node:
        """Derive level after level."""
        node = self
        for index in path:
            node = node.child(index)
        return node


def channel_words(client_key: bytes, expiry: UnixTime) -> list[int]:
    """PROTOCOL §9.2: the first four words of SHA256(E ‖ C), bit 31 of each cleared."""
    digest = sha256(expiry.to_bytes(4, "big") + client_key).digest()
    return [int.from_bytes(digest[i : i + 4], "big") & ~HARDENED for i in range(0, 16, 4)]


class TreeKeys:
    """A key per channel, perhaps a destination per channel, and the reserve's key, derived from one seed."""

    __slots__ = ("_channel_key", "_destination", "_destination_key", "_reserve_key")

    def __init__(
        self,
        channel_key: Callable[[bytes, UnixTime], Node],
        destination_key: Callable[[bytes, UnixTime], Node],
        reserve_key: Node,
        destination: bytes | None,
    ) -> None:
        self._channel_key = lru_cache(CACHED_CHILDREN)(channel_key)
        self._destination_key = lru_cache(CACHED_CHILDREN)(destination_key)
        self._reserve_key = reserve_key.key
        self._destination = destination

    def public_key(self, client_key: bytes, expiry: UnixTime) -> bytes:
        return self._channel_key(client_key, expiry).key.public_key.format()

    def destination_script(self, client_key: bytes, expiry: UnixTime) -> bytes:
        return self._destination or key_script(self._destination_key(client_key, expiry).key.public_key.format())

    def sign(self, client_key: bytes, expiry: UnixTime, digest: bytes) -> bytes:
        return self._channel_key(client_key, expiry).key.sign(digest, hasher=None)

    def destination_key(self, client_key: bytes, expiry: UnixTime) -> bytes | None:
        return None if self._destination else self._destination_key(client_key, expiry).key.public_key.format()

    def sign_destination(self, client_key: bytes, expiry: UnixTime, digest: bytes) -> bytes:
        return self._destination_key(client_key, expiry).key.sign(digest, hasher=None)

    def reserve_key(self) -> bytes:
        return self._reserve_key.public_key.format()

    def sign_reserve(self, digest: bytes) -> bytes:
        return self._reserve_key.sign(digest, hasher=None)


def hardened_keys(seed: bytes, destination: bytes | None = None) -> TreeKeys:
    """Keys of which none tells anything about another; without `destination`, each channel has its own (P2PKH)."""
    root = Node.from_seed(seed)
    channels, destinations = root.child(CHANNEL_BRANCH), root.child(DESTINATION_BRANCH)
    return TreeKeys(_hardened_below(channels), _hardened_below(destinations), root.descend(RESERVE_PATH), destination)


def rbpcp_v2_keys(seed: bytes, destination: bytes | None = None) -> TreeKeys:
    """Keys as PROTOCOL §9.2 derives them.

    "with non-hardened derivation, one leaked child private key plus the xpub reveals the root key": no xpub leaves us.
    """
    root = Node.from_seed(seed)

    def channel_key(client_key: bytes, expiry: UnixTime) -> Node:
        return root.descend(channel_words(client_key, expiry))

    return TreeKeys(channel_key, _hardened_below(root), root.descend(RESERVE_PATH), destination)


def _hardened_below(node: Node) -> Callable[[bytes, UnixTime], Node]:
    def derive(client_key: bytes, expiry: UnixTime) -> Node:
        return node.descend([word | HARDENED for word in channel_words(client_key, expiry)])

    return derive
