"""The place that the operator names for all settlements: an address, or a wallet that this signer only watches.

A wallet is given by an output descriptor (BIP380 to BIP386) with an extended public key (BIP32), or by an extended public
key whose version names the script type (SLIP-132). A channel's place is one of the wallet's first 20 receiving addresses.
Each wallet looks at these, since 20 is BIP44's gap limit; the choice follows from the channel, so nothing is stored.
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Callable
from functools import lru_cache
from hashlib import sha256
from typing import NamedTuple, NoReturn, Protocol

import bitcoin.base58
from bitcoin.core import Hash
from coincurve import PublicKey

from paychan.protocol.address import decode_address, hash160, key_script, p2sh_script, witness_script
from paychan.protocol.errors import Malformed
from paychan.protocol.types import Network, UnixTime

GAP_LIMIT = 20
"""BIP44, "Address gap limit": wallets look at this many addresses behind the last one with coins."""

_FIELD = "destination"
_TAKEN_APART = re.compile(
    r"(?P<kind>pkh|wpkh|sh\(wpkh|tr)\((?:\[[0-9a-fA-F]{8}(?:/\d+['hH]?)*\])?(?P<key>[a-zA-Z0-9]+)"
    r"(?P<path>(?:/\d+)*)(?P<fork>/<\d+;\d+>)?/\*\)(?P<end>\)?)(?:#(?P<checksum>[a-z0-9]{8}))?"
)
_EXTENDED = re.compile(r"(?:[xyztuv])(?P<half>pub|prv)[1-9A-HJ-NP-Za-km-z]{50,}")
_KINDS = {"xpub": "", "ypub": "sh(wpkh", "zpub": "wpkh", "tpub": "", "upub": "sh(wpkh", "vpub": "wpkh"}
"""Script type by the first letters, SLIP-132; xpub and tpub are used for all types."""

_LIVE = frozenset(("xpub", "ypub", "zpub"))
_SERIALIZED_BYTES = 78
_HARDENED = 1 << 31


class Payout(Protocol):
    """A place that settlements pay to."""

    def script(self, client_key: bytes, expiry: UnixTime) -> bytes:
        """Return the scriptPubKey for a channel."""


class Fixed(NamedTuple):
    """One script for all channels."""

    place: bytes

    def script(self, client_key: bytes, expiry: UnixTime) -> bytes:  # noqa: ARG002 - one script
        return self.place


class Wallet:
    """The receiving addresses of an operator's wallet."""

    __slots__ = ("at",)

    def __init__(self, at: Callable[[int], bytes]) -> None:
        """`at` returns the scriptPubKey of the address with an index."""
        self.at = lru_cache(GAP_LIMIT)(at)

    def script(self, client_key: bytes, expiry: UnixTime) -> bytes:
        digest = sha256(expiry.to_bytes(4, "big") + client_key).digest()
        return self.at(int.from_bytes(digest, "big") % GAP_LIMIT)


def is_change(text: str) -> bool:
    """Whether a descriptor names the addresses for change (BIP44, "Change": chain 1), not those for receiving."""
    parts = _TAKEN_APART.fullmatch(text.strip())
    return parts is not None and _steps(parts)[-1:] == [1]


def parse_payout(text: str, network: Network) -> Payout:
    """Read an address, a descriptor, or an extended public key that names its script type.

    Raises:
        Malformed: none of these, of another network, a private key, or a wrong checksum.
    """
    text = text.strip()
    if "(" not in text and not _EXTENDED.fullmatch(text):
        return Fixed(decode_address(text, network, _FIELD))
    if (found := _EXTENDED.search(text)) and found["half"] == "prv":
        _refuse("this is a private key: give the public one, which begins with xpub, ypub, zpub or tpub")
    if "(" not in text:
        kind = _KINDS[text[:4]]
        if not kind:
            forms = ", ".join(f"{form}({text[:4]}…/0/*)" for form in ("pkh", "wpkh", "tr"))
            _refuse(f"{text[:4]} does not name the type of the addresses: write {forms} or sh(wpkh({text[:4]}…/0/*))")
        return _wallet(kind, text, [0], network)
    parts = _TAKEN_APART.fullmatch(text)
    if parts is None or (parts["end"] == ")") != parts["kind"].startswith("sh"):
        _refuse(
            "want an address, or a descriptor of one key such as wpkh([73c5da0a/84h/0h/0h]xpub…/0/*): "
            "pkh, wpkh, sh(wpkh) or tr"
        )
    if parts["checksum"] and parts["checksum"] != checksum(text.split("#")[0]):
        _refuse(f"the descriptor's checksum is {parts['checksum']}, want {checksum(text.split('#')[0])}")
    return _wallet(parts["kind"], parts["key"], _steps(parts), network)


def _steps(parts: re.Match[str]) -> list[int]:
    """Return the indices of a descriptor's path before the address; of a fork `<0;1>` the first."""
    fork = [parts["fork"][2:].split(";")[0]] if parts["fork"] else []
    return [int(step) for step in (*parts["path"].split("/")[1:], *fork)]


def _wallet(kind: str, key: str, path: list[int], network: Network) -> Wallet:
    node = _read_key(key, network)
    for index in path:
        node = node.child(index)
    make = _SCRIPTS[kind]
    return Wallet(lambda index: make(node.child(index).key))


class _PublicNode(NamedTuple):
    """An extended public key (BIP32)."""

    key: bytes
    chain_code: bytes

    def child(self, index: int) -> _PublicNode:
        """Derive one level without hardening (BIP32, CKDpub)."""
        if index >= _HARDENED:
            _refuse(f"index {index} is hardened, which an extended public key can't derive")
        digest = hmac.digest(self.chain_code, self.key + index.to_bytes(4, "big"), "sha512")
        return _PublicNode(PublicKey(self.key).add(digest[:32]).format(), digest[32:])


def _read_key(text: str, network: Network) -> _PublicNode:
    prefix = text[:4]
    if prefix not in _KINDS:
        _refuse(f"{text[:8]}… is no extended public key: want one that begins with xpub or tpub")
    if (prefix in _LIVE) != (network is Network.LIVE):
        _refuse(f"{prefix}… is no extended key of the {network.value} network")
    try:
        raw = bytes(bitcoin.base58.decode(text))
        content, check = raw[:-4], raw[-4:]
        if len(content) != _SERIALIZED_BYTES or Hash(content)[:4] != check:
            _refuse("the extended key has a wrong length or checksum")
        return _PublicNode(PublicKey(content[45:]).format(), content[13:45])
    except (ValueError, bitcoin.base58.InvalidBase58Error):
        _refuse("the extended key is not base58, or not a public key")


def _refuse(reason: str) -> NoReturn:
    raise Malformed(field=_FIELD, reason=reason)


def _witness_key_script(key: bytes) -> bytes:
    return witness_script(0, hash160(key))


def _taproot_script(key: bytes) -> bytes:
    """Return the script of a key alone, without script paths (BIP86)."""
    tag = sha256(b"TapTweak").digest()
    inside = key[1:]
    output = PublicKey(b"\x02" + inside).add(sha256(tag + tag + inside).digest())
    return witness_script(1, output.format()[1:])


_SCRIPTS: dict[str, Callable[[bytes], bytes]] = {
    "pkh": key_script,
    "wpkh": _witness_key_script,
    "sh(wpkh": lambda key: p2sh_script(_witness_key_script(key)),
    "tr": _taproot_script,
}

_INPUTS = "0123456789()[],'/*abcdefgh@:$%{}IJKLMNOPQRSTUVWXYZ&+-.;<=>?!^_|~ijklmnopqrstuvwxyzABCDEFGH`#\"\\ "
_CHECKS = "qpzry9x8gf2tvdw0s3jn54khce6mua7l"
_GENERATOR = (0xF5DEE51989, 0xA9FDCA3312, 0x1BAB10E32D, 0x3706B1677A, 0x644D626FFD)


def checksum(descriptor: str) -> str:
    """Return the eight characters that follow "#" (BIP380, "Checksum"). Raises `Malformed`: another character."""
    symbols, groups = [], []
    for character in descriptor:
        if character not in _INPUTS:
            _refuse(f"a descriptor has no character {character!r}")
        value = _INPUTS.find(character)
        symbols.append(value & 31)
        groups.append(value >> 5)
        if len(groups) == 3:
            symbols.append(groups[0] * 9 + groups[1] * 3 + groups[2])
            groups = []
    if groups:
        symbols.append(groups[0] if len(groups) == 1 else groups[0] * 3 + groups[1])
    value = _polymod([*symbols, *[0] * 8]) ^ 1
    return "".join(_CHECKS[(value >> (5 * (7 - index))) & 31] for index in range(8))


def _polymod(symbols: list[int]) -> int:
    value = 1
    for symbol in symbols:
        top = value >> 35
        value = (value & 0x7FFFFFFFF) << 5 ^ symbol
        for index, each in enumerate(_GENERATOR):
            value ^= each if (top >> index) & 1 else 0
    return value
