"""Addresses: base58 of the two script types, of the right network; all other texts are refused (threats 27 and 37)."""

from __future__ import annotations

import pytest
from bitcoin import base58
from bitcoin.core import Hash

from paychan.protocol.address import decode_address, encode_address, key_script, p2pkh_script, p2sh_script
from paychan.protocol.errors import Malformed
from paychan.protocol.types import Network

LIVE_P2PKH, LIVE_P2SH = "1A1zP1eP5QGefi2DMPTfTL5SLmv7DivfNa", "3P14159f73E4gFr7JterCCQh9QjiTjiZrG"
TEST_P2PKH, TEST_P2SH = "mm9mm96b8bZRBacaAvY5MEeDd6HW46qFcY", "2NEQahmapUBueLzinJEViGkLdXRrzskH7Px"
NOT_LIVE = [Network.TEST, Network.REGTEST]


def checked(payload: bytes) -> str:
    """Base58 of any payload with a correct checksum."""
    return str(base58.encode(payload + Hash(payload)[:4]))


@pytest.mark.parametrize(
    ("text", "networks"),
    [
        (LIVE_P2PKH, [Network.LIVE]),
        (LIVE_P2SH, [Network.LIVE]),
        (TEST_P2PKH, NOT_LIVE),
        (TEST_P2SH, NOT_LIVE),
        ("1111111111111111111114oLvT2", [Network.LIVE]),
    ],
)
def test_an_address_is_read_on_its_own_network_alone(text: str, networks: list[Network]) -> None:
    """An address decodes to a script that encodes to the same address; on any other network it is refused."""
    for network in Network:
        if network in networks:
            assert encode_address(decode_address(text, network), network) == text
        else:
            with pytest.raises(Malformed, match=f"not of the {network.value} network"):
                decode_address(text, network)


@pytest.mark.parametrize("position", range(len(TEST_P2PKH)))
def test_a_changed_character_breaks_the_checksum(position: int) -> None:
    """The checksum detects a change of any single character."""
    other = "2" if TEST_P2PKH[position] != "2" else "3"

    with pytest.raises(Malformed):
        decode_address(TEST_P2PKH[:position] + other + TEST_P2PKH[position + 1 :], Network.TEST)


@pytest.mark.parametrize(
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
        "tb1qw508d6qejxtdg4y5r3zarvary0c5xw7kxpjzsx",
        "bcrt1qw508d6qejxtdg4y5r3zarvary0c5xw7kygt080",
        "tb1pqqqqp399et2xygdj5xreqhjjvcmzhxw4aywxecjdzew6hylgvsesf3hn0c",
        "cPV6ggj5mfYgD8ZS24jw7jnKEpZbM969KaQTFhkQWhuxHLV7PPdv",
        "m" * 41,
        "1" * 100_000,
    ],
)
def test_threat_37_other_texts_are_refused(text: str) -> None:
    """Segwit addresses, private keys, spaces, similar characters and long texts are refused."""
    with pytest.raises(Malformed):
        decode_address(text, Network.TEST)


@pytest.mark.parametrize("size", [0, 1, 19, 21, 22, 24])
def test_threat_37_a_payload_of_another_length_is_refused(size: int) -> None:
    """A hash of the wrong length is refused, even with a correct checksum."""
    with pytest.raises(Malformed, match="length or checksum"):
        decode_address(checked(b"\x6f" + bytes(size)), Network.TEST)


@pytest.mark.parametrize("version", [v for v in range(256) if v not in {0x6F, 0xC4}])
def test_threat_37_every_other_version_byte_is_refused(version: int) -> None:
    """Only the P2PKH and P2SH versions of the network are accepted; the other 254 version bytes are refused."""
    with pytest.raises(Malformed, match=f"address version {version}"):
        decode_address(checked(bytes([version]) + b"\x11" * 20), Network.REGTEST)


def test_the_field_is_named() -> None:
    """The refusal names the field that held the address."""
    with pytest.raises(Malformed, match=r"^refund_address: "):
        decode_address("?", Network.TEST, "refund_address")


@pytest.mark.parametrize("script", [b"", b"\x6a", b"\x00\x14" + bytes(20), p2pkh_script(bytes(20))[:-1] + b"\xad"])
def test_scripts_of_other_types_have_no_address(script: bytes) -> None:
    """Only P2PKH and P2SH scripts have an address; encoding another script is a bug of the caller."""
    with pytest.raises(ValueError, match="neither P2PKH nor P2SH"):
        encode_address(script, Network.TEST)


def test_script_templates() -> None:
    """The two scripts are the standard ones: 25 bytes P2PKH, 23 bytes P2SH."""
    assert p2pkh_script(b"\x22" * 20).hex() == "76a914" + "22" * 20 + "88ac"
    assert key_script(bytes.fromhex("0279be667ef9dcbbac55a06295ce870b07029bfcdb2dce28d959f2815b16f81798")).hex() == (
        "76a914751e76e8199196d454941c45d1b3a323f1433bd688ac"
    )
    assert p2sh_script(b"").hex() == "a914b472a266d0bd89c13706a4132ccfb16f7c3b9fcb87"
