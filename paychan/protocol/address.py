"""Addresses of the script types that a settlement or refund pays to: P2PKH, P2SH, P2WPKH, P2WSH and P2TR.

The first two are base58check texts. The others are witness programs (BIP141), Bech32 (BIP173) or Bech32m (BIP350) texts.
Other witness programs are refused, although BIP350 asks wallets to send to each: no rule says yet how to spend outputs
of the versions 2 to 16, so any miner may take them. The same holds for version 1 with other than 32 bytes (BIP341).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import bitcoin.base58
from bitcoin.core import Hash, Hash160

from paychan.protocol.bech32 import decode, encode_program, witness_program
from paychan.protocol.errors import Malformed
from paychan.protocol.types import Network, Sat

ADDRESS_TYPES = "P2PKH, P2SH, P2WPKH, P2WSH or P2TR"
"""The types that are taken, as refusals name them."""

_MAX_BASE58_CHARACTERS = 40
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


def witness_script(version: int, program: bytes) -> bytes:
    """ScriptPubKey of a witness program (BIP141)."""
    return bytes([0x50 + version if version else 0, len(program)]) + program


def is_address_script(script: bytes) -> bool:
    """Say whether a script has one of the types above; every node relays outputs of these types."""
    return is_key_script(script) or is_script_hash(script) or is_witness_script(script)


def is_witness_script(script: bytes) -> bool:
    """Say whether it is P2WPKH, P2WSH or P2TR."""
    return (len(script), script[:2]) in ((22, b"\x00\x14"), (34, b"\x00\x20"), (34, b"\x51\x20"))


def is_script_hash(script: bytes) -> bool:
    """Say whether it is P2SH."""
    return len(script) == 23 and script == p2sh_script_of(script[2:22])


def is_key_script(script: bytes) -> bool:
    """Say whether it is P2PKH."""
    return len(script) == 25 and script == p2pkh_script(script[3:23])


def key_script(public_key: bytes) -> bytes:
    """ScriptPubKey (P2PKH) of a serialized public key."""
    return p2pkh_script(hash160(public_key))


def least_relayed_sat(script: bytes) -> Sat:
    """Smallest value, in satoshi, of an output with a script of these types that nodes relay.

    Bitcoin Core's GetDustThreshold (policy/policy.cpp) at 3 sat for each byte of the output and of the input that will
    spend it: P2PKH 546, P2SH 540, P2WPKH 294, P2WSH and P2TR 330.
    """
    spending = 36 + 4 + 1 + (107 // 4 if is_witness_script(script) else 107)
    return Sat(3 * (8 + 1 + len(script) + spending))


def encode_address(script: bytes, network: Network) -> str:
    """Show a scriptPubKey as an address, in lower case if it is a witness program.

    Raises:
        ValueError: the script is of another type; no caller in this project builds one.
    """
    if is_witness_script(script):
        return encode_program(network.bech32_prefix, int(script[0] != 0), script[2:])
    if is_key_script(script):
        payload = bytes([network.p2pkh_version]) + script[3:23]
    elif is_script_hash(script):
        payload = bytes([network.p2sh_version]) + script[2:22]
    else:
        msg = f"not {ADDRESS_TYPES}: {script.hex()}"
        raise ValueError(msg)
    return str(bitcoin.base58.encode(payload + Hash(payload)[:4]))


def decode_address(text: str, network: Network, field: str = "change_address") -> bytes:
    """Read an address of this network as its scriptPubKey.

    Raises:
        Malformed: a wrong form or checksum, another type, or an address of another network.
    """
    try:
        script, networks = _read_bech32(text) if _has_bech32_prefix(text) else _read_base58(text)
    except ValueError as error:
        problem = str(error)
    else:
        if network in networks:
            return script
        problem = f"address of the {' or '.join(each.value for each in networks)} network"
    raise Malformed(field=field, reason=f"{problem}; want a {ADDRESS_TYPES} address of the {network.value} network")


def _has_bech32_prefix(text: str) -> bool:
    """Say whether a text begins like a witness address; no base58 address of these networks does."""
    return text.lower().startswith(tuple(f"{network.bech32_prefix}1" for network in Network))


def _read_bech32(text: str) -> tuple[bytes, list[Network]]:
    """Return the scriptPubKey of a witness address and its networks. Raises ValueError."""
    if text.count("1") > 1:
        msg = "the character 1 after the prefix, which bech32 does not have (l, i or j?)"
        raise ValueError(msg)
    decoded = decode(text)
    version, program = witness_program(decoded)
    script = witness_script(version, program)
    if not is_witness_script(script):
        msg = f"witness version {version} with {len(program)} bytes, whose outputs need no signature"
        raise ValueError(msg)
    return script, [network for network in Network if network.bech32_prefix == decoded.prefix]


def _read_base58(text: str) -> tuple[bytes, list[Network]]:
    """Return the scriptPubKey of a base58check address and its networks. Raises ValueError."""
    if len(text) > _MAX_BASE58_CHARACTERS:
        msg = f"{len(text)} characters that are no address"
        raise ValueError(msg)
    try:
        raw = bytes(bitcoin.base58.decode(text))
    except bitcoin.base58.InvalidBase58Error:
        msg = "neither base58 nor bech32"
        raise ValueError(msg) from None
    if len(raw) != 25 or Hash(raw[:21])[:4] != raw[21:]:
        msg = "wrong length or checksum"
        raise ValueError(msg)
    version, payload = raw[0], raw[1:21]
    for script, networks in (
        (p2pkh_script(payload), [network for network in Network if network.p2pkh_version == version]),
        (p2sh_script_of(payload), [network for network in Network if network.p2sh_version == version]),
    ):
        if networks:
            return script, networks
    msg = f"base58 address of version {version}"
    raise ValueError(msg)
