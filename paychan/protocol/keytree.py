"""BIP32: private keys that follow from one seed. The signer's keys and the payer's are nodes of such trees.

BIP32 is implemented here, in thirty lines that tests check with the vectors of BIP32. The packages that were tried:
bip32 5.0.0 and hdwallet 3.6.1 require a coincurve below 21; bip-utils 2.12.3 imports 350 modules and takes 335 µs for a
channel's key (186 µs here); embit 0.8.0 takes 251 µs, and falls back to Python's integers without a word.
"""

from __future__ import annotations

import hmac
from collections.abc import Sequence

import bitcoin.base58
from bitcoin.core import Hash, Hash160
from coincurve import PrivateKey

from paychan.protocol.keys import GROUP_ORDER
from paychan.protocol.types import Network

HARDENED = 1 << 31
"""BIP32: indices from here on derive hardened children, which a leaked sibling and the public parent don't reveal."""


class Node:
    """A BIP32 node: private key and chain code.

    A key is 32 bytes until it is needed: its public key, which coincurve computes at once, costs more than all else.
    """

    __slots__ = ("_secret", "chain_code")

    def __init__(self, secret: bytes, chain_code: bytes) -> None:
        self._secret = secret
        self.chain_code = chain_code

    @classmethod
    def from_seed(cls, seed: bytes) -> Node:
        """Make the master node."""
        digest = hmac.digest(b"Bitcoin seed", seed, "sha512")
        return cls(digest[:32], digest[32:])

    @property
    def key(self) -> PrivateKey:
        """The private key. Raises ValueError: it is 0 or not below the order, which happens once in 2^127."""
        return PrivateKey(self._secret)

    def child(self, index: int) -> Node:
        """Derive one level.

        Raises:
            ValueError: BIP32's "in case parse256(IL) >= n or ki = 0", which happens once in 2^127.
        """
        parent = b"\x00" + self._secret if index >= HARDENED else self.key.public_key.format()
        digest = hmac.digest(self.chain_code, parent + index.to_bytes(4, "big"), "sha512")
        return Node(_sum(digest[:32], self._secret), digest[32:])

    def descend(self, path: Sequence[int]) -> Node:
        """Derive level after level."""
        node = self
        for index in path:
            node = node.child(index)
        return node


def _sum(left: bytes, secret: bytes) -> bytes:
    """Add the left half of the digest to the parent's key, modulo the order (CKDpriv of BIP32). Raises as `child`."""
    tweak = int.from_bytes(left, "big")
    found = (tweak + int.from_bytes(secret, "big")) % GROUP_ORDER
    if tweak >= GROUP_ORDER or not found:
        msg = "BIP32 has no child at this index"
        raise ValueError(msg)
    return found.to_bytes(32, "big")


PAYER_BRANCH = int.from_bytes(b"pchw", "big") | HARDENED
"""First level of the payer's channel keys: m/"pchw"'/i', with i counted from 0 in each wallet. No key of a signer is there."""


def payer_key(seed: bytes, index: int) -> PrivateKey:
    """Derive the key of a payer's channel from BIP39's 64 bytes.

    Raises:
        ValueError: the index is not in 0 to 2^31 - 1, or see `Node.child`.
    """
    if not 0 <= index < HARDENED:
        msg = f"index of a key: got {index}, want 0 to {HARDENED - 1}"
        raise ValueError(msg)
    return Node.from_seed(seed).descend((PAYER_BRANCH, HARDENED | index)).key


_PRIVATE_VERSIONS = {Network.LIVE: 0x0488ADE4}
_TEST_PRIVATE_VERSION = 0x04358394
"""BIP32, "Serialization format": xprv on the main network, tprv on the others."""


def payer_descriptor(seed: bytes, network: Network) -> str:
    """Describe the P2PKH addresses of all keys of `payer_key`, with the private keys (BIP380, BIP381).

    A wallet that imports it finds and spends all change and refunds that went to the channels' own keys.
    """
    master = Node.from_seed(seed)
    node = master.child(PAYER_BRANCH)
    payload = (
        _PRIVATE_VERSIONS.get(network, _TEST_PRIVATE_VERSION).to_bytes(4, "big")
        + b"\x01"
        + bytes(Hash160(master.key.public_key.format())[:4])
        + PAYER_BRANCH.to_bytes(4, "big")
        + node.chain_code
        + b"\x00"
        + node.key.secret
    )
    text = f"pkh({bitcoin.base58.encode(payload + Hash(payload)[:4])}/*')"
    return f"{text}#{_descriptor_checksum(text)}"


_DESCRIPTOR_TEXT = "0123456789()[],'/*abcdefgh@:$%{}IJKLMNOPQRSTUVWXYZ&+-.;<=>?!^_|~ijklmnopqrstuvwxyzABCDEFGH`#\"\\ "
_CHECKSUM_TEXT = "qpzry9x8gf2tvdw0s3jn54khce6mua7l"
_GENERATOR = (0xF5DEE51989, 0xA9FDCA3312, 0x1BAB10E32D, 0x3706B1677A, 0x644D626FFD)


def _descriptor_checksum(text: str) -> str:
    """Return the eight letters of BIP380's checksum."""
    places = [_DESCRIPTOR_TEXT.index(each) for each in text]
    groups = [place >> 5 for place in places]
    symbols = []
    for at, place in enumerate(places):
        symbols.append(place & 31)
        if at % 3 == 2:
            symbols.append(groups[at - 2] * 9 + groups[at - 1] * 3 + groups[at])
    rest = groups[len(groups) - len(groups) % 3 :]
    if rest:
        symbols.append(rest[0] if len(rest) == 1 else rest[0] * 3 + rest[1])
    check = 1
    for symbol in (*symbols, *[0] * 8):
        top = check >> 35
        check = (check & 0x7FFFFFFFF) << 5 ^ symbol
        for bit, generator in enumerate(_GENERATOR):
            check ^= generator if top >> bit & 1 else 0
    check ^= 1
    return "".join(_CHECKSUM_TEXT[check >> 5 * (7 - place) & 31] for place in range(8))
