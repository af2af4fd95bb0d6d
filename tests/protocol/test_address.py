"""Addresses of the five script types, of the right network; all other texts are refused (threats 27 and 37)."""

from __future__ import annotations

import pytest
from bitcoin import base58
from bitcoin.core import Hash

from paychan.protocol.address import (
    ADDRESS_TYPES,
    decode_address,
    encode_address,
    key_script,
    least_relayed_sat,
    p2pkh_script,
    p2sh_script,
    witness_script,
)
from paychan.protocol.errors import Malformed
from paychan.protocol.types import Network
from tests.lib.looped import looped

LIVE_P2PKH, LIVE_P2SH = "1A1zP1eP5QGefi2DMPTfTL5SLmv7DivfNa", "3P14159f73E4gFr7JterCCQh9QjiTjiZrG"
TEST_P2PKH, TEST_P2SH = "mm9mm96b8bZRBacaAvY5MEeDd6HW46qFcY", "2NEQahmapUBueLzinJEViGkLdXRrzskH7Px"
TEST_P2WPKH = "tb1qw508d6qejxtdg4y5r3zarvary0c5xw7kxpjzsx"
TEST_P2WSH = "tb1qrp33g0q5c5txsp9arysrx4k6zdkfs4nce4xj0gdcccefvpysxf3q0sl5k7"
TEST_P2TR = "tb1pqqqqp399et2xygdj5xreqhjjvcmzhxw4aywxecjdzew6hylgvsesf3hn0c"
WITNESS = [TEST_P2WPKH, TEST_P2WSH, TEST_P2TR]
NOT_LIVE = [Network.TEST, Network.REGTEST]


def checked(payload: bytes) -> str:
    """Base58 of any payload with a correct checksum."""
    return str(base58.encode(payload + Hash(payload)[:4]))


@looped(
    ("text", "networks"),
    [
        (LIVE_P2PKH, [Network.LIVE]),
        (LIVE_P2SH, [Network.LIVE]),
        (TEST_P2PKH, NOT_LIVE),
        (TEST_P2SH, NOT_LIVE),
        ("1111111111111111111114oLvT2", [Network.LIVE]),
        *[(text, [Network.TEST]) for text in WITNESS],
        ("bc1qw508d6qejxtdg4y5r3zarvary0c5xw7kv8f3t4", [Network.LIVE]),
        ("bc1p0xlxvlhemja6c4dqv22uapctqupfhlxm9h8z3k2e72q4k9hcz7vqzk5jj0", [Network.LIVE]),
        ("bcrt1qw508d6qejxtdg4y5r3zarvary0c5xw7kygt080", [Network.REGTEST]),
    ],
)
def test_an_address_is_read_on_its_own_network_alone(text: str, networks: list[Network]) -> None:
    """An address decodes to a script that encodes to the same address; elsewhere the refusal names both networks."""
    own = " or ".join(network.value for network in networks)
    for network in Network:
        if network in networks:
            assert encode_address(decode_address(text, network), network) == text
        else:
            with pytest.raises(Malformed, match=f"of the {own} network; want .* of the {network.value} network$"):
                decode_address(text, network)


@looped("text", [TEST_P2PKH, *WITNESS, *[text.upper() for text in WITNESS]])
def test_a_changed_character_breaks_the_checksum(text: str) -> None:
    """The checksum detects a change of any single character; no other network reads the changed text either."""
    for position, character in enumerate(text):
        for other in "123456789qpzryx8gf2tvdw0s3jn54khce6mua7lQPZMbio ":
            if other == character:
                continue
            for network in Network:
                with pytest.raises(Malformed):
                    decode_address(text[:position] + other + text[position + 1 :], network)


@looped("text", WITNESS)
def test_upper_case_is_read_and_mixed_case_refused(text: str) -> None:
    """BIP173: an address is all upper case, as in QR codes, or all lower case."""
    assert decode_address(text.upper(), Network.TEST) == decode_address(text, Network.TEST)
    for mixed in (text[:2].upper() + text[2:], text[:3] + text[3:].upper(), text[:-1] + text[-1].upper()):
        if mixed != text:
            with pytest.raises(Malformed, match=f"mixed; want a {ADDRESS_TYPES} address of the test network"):
                decode_address(mixed, Network.TEST)


@looped(
    ("script", "sat"),
    [
        (p2pkh_script(bytes(20)), 546),
        (p2sh_script(b""), 540),
        (witness_script(0, bytes(20)), 294),
        (witness_script(0, bytes(32)), 330),
        (witness_script(1, bytes(32)), 330),
    ],
)
def test_the_smallest_output_depends_on_the_type(script: bytes, sat: int) -> None:
    """The numbers of Bitcoin Core's GetDustThreshold at its default rate."""
    assert least_relayed_sat(script) == sat


@looped(
    "text",
    [
        "",
        "1",
        "11111111111111111111111111111111111",
        " " + TEST_P2PKH,
        TEST_P2PKH + " ",
        TEST_P2PKH + "\n",
        TEST_P2PKH[:5] + " " + TEST_P2PKH[5:],
        "1" + TEST_P2PKH,
        TEST_P2PKH + "1",
        TEST_P2PKH[:-1],
        TEST_P2PKH.replace("m", "\uff4d", 1),
        TEST_P2PKH.replace("9", "\u0669", 1),
        TEST_P2PKH[:-1] + "\ud800",
        TEST_P2PKH[:-1] + "0",
        TEST_P2PKH[:-1] + "O",
        TEST_P2PKH[:-1] + "I",
        TEST_P2PKH[:-1] + "l",
        "bcrt1qw508d6qejxtdg4y5r3zarvary0c5xw7kygt080",
        TEST_P2TR + " ",
        TEST_P2TR + "\n",
        TEST_P2WPKH[:-1],
        TEST_P2WPKH.replace("k", "\u212a", 1),
        "tb1" + "q" * 100_000,
        "tb1",
        "tb1qqqqqq",
        "ltc1qw508d6qejxtdg4y5r3zarvary0c5xw7kgmn4n9",
        "cPV6ggj5mfYgD8ZS24jw7jnKEpZbM969KaQTFhkQWhuxHLV7PPdv",
        "m" * 41,
        "1" * 100_000,
    ],
)
def test_threat_37_other_texts_are_refused(text: str) -> None:
    """Addresses of other networks, private keys, spaces, similar characters and long texts are refused."""
    with pytest.raises(Malformed):
        decode_address(text, Network.TEST)


@looped("size", [0, 1, 19, 21, 22, 24])
def test_threat_37_a_payload_of_another_length_is_refused(size: int) -> None:
    """A hash of the wrong length is refused, even with a correct checksum."""
    with pytest.raises(Malformed, match="length or checksum"):
        decode_address(checked(b"\x6f" + bytes(size)), Network.TEST)


@looped("version", [v for v in range(256) if v not in {0x6F, 0xC4}])
def test_threat_37_every_other_version_byte_is_refused(version: int) -> None:
    """Only the P2PKH and P2SH versions of the network are accepted; the other 254 version bytes are refused."""
    with pytest.raises(Malformed, match=f"address of (version {version}|the live network); want"):
        decode_address(checked(bytes([version]) + b"\x11" * 20), Network.REGTEST)


def test_the_field_is_named() -> None:
    """The refusal names the field that held the address."""
    with pytest.raises(Malformed, match=r"^refund_address: "):
        decode_address("?", Network.TEST, "refund_address")


OTHER_SCRIPTS = [
    p2pkh_script(bytes(20))[:-1] + b"\xad",
    witness_script(0, bytes(20))[:-1],
    witness_script(0, bytes(31)),
    witness_script(1, bytes(20)),
    witness_script(1, bytes(2)),
    witness_script(2, bytes(32)),
    witness_script(16, bytes(32)),
]


@looped("script", [b"", b"\x6a", *OTHER_SCRIPTS])
def test_scripts_of_other_types_have_no_address(script: bytes) -> None:
    """Only scripts of the five types have an address; encoding another script is a bug of the caller."""
    with pytest.raises(ValueError, match=f"not {ADDRESS_TYPES}"):
        encode_address(script, Network.TEST)


def test_script_templates() -> None:
    """The two scripts are the standard ones: 25 bytes P2PKH, 23 bytes P2SH."""
    assert p2pkh_script(b"\x22" * 20).hex() == "76a914" + "22" * 20 + "88ac"
    assert key_script(bytes.fromhex("0279be667ef9dcbbac55a06295ce870b07029bfcdb2dce28d959f2815b16f81798")).hex() == (
        "76a914751e76e8199196d454941c45d1b3a323f1433bd688ac"
    )
    assert p2sh_script(b"").hex() == "a914b472a266d0bd89c13706a4132ccfb16f7c3b9fcb87"
