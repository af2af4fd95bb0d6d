"""Base58 addresses of the two script types a channel pays to, P2PKH and P2SH."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import bitcoin.base58
from bitcoin.core import Hash, Hash160

from paychan.protocol.errors import Malformed
from paychan.protocol.types import Network

_MAX_ADDRESS_CHARS = 40
"""Longest base58check text of 25 bytes is 35; the cap bounds the decoder's quadratic work."""


def _quickest_hash160() -> Callable[[bytes], bytes]:
    """Return OpenSSL's hash, or python-bitcoinlib's (some hundred times slower) if OpenSSL has no RIPEMD-160."""
    try:
        empty = hashlib.new("ripemd160", usedforsecurity=False)
    except ValueError:
        return lambda data: bytes(Hash160(data))

    def openssl_hash160(data: bytes) -> bytes:
        ripemd160 = empty.copy()  # hashlib.new would look the name up, which takes as long as the hash itself
        ripemd160.update(hashlib.sha256(data).digest())
        return ripemd160.digest()

    return openssl_hash160


hash160 = _quickest_hash160()
"""RIPEMD-160 of SHA-256: the hash of a key or script that an address contains."""


def p2pkh_script(public_key_hash: bytes) -> bytes:
    """ScriptPubKey that pays to the hash of a public key (20 bytes)."""
    return b"\x76\xa9\x14" + public_key_hash + b"\x88\xac"


def p2sh_script(redeem_script: bytes) -> bytes:
    """ScriptPubKey that pays to the hash of a redeem script (BIP16)."""
    return p2sh_script_of(hash160(redeem_script))


def p2sh_script_of(script_hash: bytes) -> bytes:
    """ScriptPubKey that pays to the hash of a redeem script (20 bytes)."""
    return b"\xa9\x14" + script_hash + b"\x87"


def is_address_script(script: bytes) -> bool:
    """P2PKH or P2SH: the scripts of v1 and v2 addresses, which every node relays."""
    return is_key_script(script) or is_script_hash(script)


def is_script_hash(script: bytes) -> bool:
    """Say whether it is P2SH."""
    return len(script) == 23 and script == p2sh_script_of(script[2:22])


def is_key_script(script: bytes) -> bool:
    """Say whether it is P2PKH."""
    return len(script) == 25 and script == p2pkh_script(script[3:23])


def key_script(public_key: bytes) -> bytes:
    """ScriptPubKey (P2PKH) of a serialized public key."""
    return p2pkh_script(hash160(public_key))


def encode_address(script: bytes, network: Network) -> str:
    """Show a P2PKH or P2SH scriptPubKey as an address.

    Raises:
        ValueError: the script is of another type; no caller in this project builds one.
    """
    if is_key_script(script):
        payload = bytes([network.p2pkh_version]) + script[3:23]
    elif is_script_hash(script):
        payload = bytes([network.p2sh_version]) + script[2:22]
    else:
        msg = f"neither P2PKH nor P2SH: {script.hex()}"
        raise ValueError(msg)
    return str(bitcoin.base58.encode(payload + Hash(payload)[:4]))


def decode_address(text: str, network: Network, field: str = "change_address") -> bytes:
    """Read an address of this network as its scriptPubKey.

    Raises:
        Malformed: bad base58, checksum, length, type, or an address of another network.
    """
    if len(text) > _MAX_ADDRESS_CHARS:
        raise Malformed(field=field, reason=f"address of {len(text)} characters")
    try:
        raw = bytes(bitcoin.base58.decode(text))
    except bitcoin.base58.InvalidBase58Error:
        raise Malformed(field=field, reason="not base58") from None
    if len(raw) != 25 or Hash(raw[:21])[:4] != raw[21:]:
        raise Malformed(field=field, reason="wrong length or checksum")
    version, payload = raw[0], raw[1:21]
    if version == network.p2pkh_version:
        return p2pkh_script(payload)
    if version == network.p2sh_version:
        return p2sh_script_of(payload)
    raise Malformed(field=field, reason=f"address version {version}, not of the {network.value} network")
