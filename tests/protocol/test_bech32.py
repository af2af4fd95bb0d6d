"""Witness addresses: the vectors of BIP173 and BIP350, whole, and the rule for versions that nothing can spend yet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from paychan.protocol import bech32
from paychan.protocol.address import decode_address, encode_address, is_address_script, witness_script
from paychan.protocol.bech32 import BECH32, BECH32M, Bech32Error
from paychan.protocol.errors import Malformed
from paychan.protocol.types import Network

VECTORS: dict[str, Any] = json.loads((Path(__file__).parents[1] / "vectors" / "bech32.json").read_text())
CONSTANTS = {"bip173": BECH32, "bip350": BECH32M}
NETWORKS = {"bc": Network.LIVE, "tb": Network.TEST}
BIPS = pytest.mark.parametrize("bip", ["bip173", "bip350"])


def program_of(text: str) -> bytes:
    """The scriptPubKey of a witness address of the main network or a test network."""
    decoded = bech32.decode(text)
    if decoded.prefix not in NETWORKS:
        raise Bech32Error(decoded.prefix)
    return witness_script(*bech32.witness_program(decoded))


@BIPS
def test_valid_texts_are_read_and_written(bip: str) -> None:
    """The text has the checksum of its BIP, not of the other, and is written again in lower case."""
    for text in VECTORS[bip]["valid_texts"]:
        decoded = bech32.decode(text)

        assert decoded.constant == CONSTANTS[bip]
        assert bech32.encode(*decoded) == text.lower()


@BIPS
def test_invalid_texts_are_refused(bip: str) -> None:
    """No text of the list is valid in either form."""
    for text in VECTORS[bip]["invalid_texts"]:
        with pytest.raises(Bech32Error):
            bech32.decode(text)


@BIPS
def test_valid_addresses_give_their_script(bip: str) -> None:
    """BIP350 replaces the addresses of BIP173 for versions from 1: those are refused."""
    for text, script in VECTORS[bip]["valid_addresses"].items():
        if bip == "bip173" and not script.startswith("00"):
            with pytest.raises(Bech32Error, match="checksum of Bech32 for version"):
                program_of(text)
            continue
        found = bech32.witness_program(bech32.decode(text))

        assert program_of(text).hex() == script
        assert bech32.encode_program(text[:2].lower(), *found) == text.lower()


@BIPS
def test_invalid_addresses_are_refused(bip: str) -> None:
    """No address of the list is read, on any network."""
    for text in VECTORS[bip]["invalid_addresses"]:
        with pytest.raises(Bech32Error):
            program_of(text)
        for network in Network:
            with pytest.raises(Malformed):
                decode_address(text, network)


def test_fault_43_an_address_is_taken_if_its_type_can_be_spent() -> None:
    """P2WPKH, P2WSH and P2TR of the vectors are taken on their network; other versions and lengths are refused."""
    taken = set()
    for text, script in VECTORS["bip350"]["valid_addresses"].items():
        network = NETWORKS[text[:2].lower()]
        if is_address_script(bytes.fromhex(script)):
            taken.add(script[:4])
            assert decode_address(text, network).hex() == script
            assert encode_address(bytes.fromhex(script), network) == text.lower()
        else:
            with pytest.raises(
                Malformed, match="whose outputs need no signature; want a P2PKH, P2SH, P2WPKH, P2WSH or P2TR"
            ):
                decode_address(text, network)
    assert taken == {"0014", "0020", "5120"}


def test_the_anchor_of_version_1_is_refused() -> None:
    """Pay-to-anchor is valid Bech32m, and its outputs need no signature."""
    with pytest.raises(Malformed, match="witness version 1 with 2 bytes, whose outputs need no signature"):
        decode_address("bc1pfeessrawgf", Network.LIVE)
