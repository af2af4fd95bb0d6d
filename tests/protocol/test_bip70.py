"""The BIP70 payment request, decoded by a separate Protocol Buffers reader in this test (RBPCP §13.3)."""

from __future__ import annotations

from collections.abc import Iterator

from paychan.protocol.types import Network, UnixTime
from paychan.protocol.wire.bip70 import payment_request
from tests.lib.looped import looped

SCRIPT = bytes.fromhex("a914" + "5a" * 20 + "87")


def fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield the fields of a message: (field number, varint or bytes)."""
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = message[position]
            position += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while position < len(message):
        key = varint()
        if key & 7 == 0:
            yield key >> 3, varint()
        else:
            assert key & 7 == 2, f"wire type {key & 7}"
            size = varint()
            assert position + size <= len(message)
            yield key >> 3, message[position : position + size]
            position += size


@looped(("network", "name"), [(Network.LIVE, b"main"), (Network.TEST, b"test"), (Network.REGTEST, b"test")])
@looped("data", [b"", b"x" * 127, b"x" * 128, b"x" * 20_000])
def test_every_field_is_read_back(network: Network, name: bytes, data: bytes) -> None:
    """The request holds one PaymentDetails, which has exactly the given fields, in order."""
    raw = payment_request(network, SCRIPT, UnixTime(1_500_000_000), UnixTime(1_500_000_900), "f\u00fcr dich", data)

    ((number, details),) = list(fields(raw))
    assert number == 4
    assert isinstance(details, bytes)
    rows = list(fields(details))
    output = rows[1][1]
    assert isinstance(output, bytes)
    assert list(fields(output)) == [(1, 0), (2, SCRIPT)]
    assert rows == [
        (1, name),
        (2, output),
        (3, 1_500_000_000),
        (4, 1_500_000_900),
        (5, "f\u00fcr dich".encode()),
        (7, data),
    ]


def test_the_documented_bytes() -> None:
    """The tags are those of the document: 0a 12 18 20 2a 3a in a 22, and an output of `08 00 12 17` and the script."""
    raw = payment_request(Network.TEST, SCRIPT, UnixTime(1), UnixTime(2), "m", b"d")

    assert (
        raw.hex()
        == "222d" + "0a0474657374" + "121b" + "08001217" + SCRIPT.hex() + "1801" + "2002" + "2a016d" + "3a0164"
    )


@looped(("size", "length"), [(127, "7f"), (128, "8001"), (16_383, "ff7f"), (16_384, "808001")])
def test_numbers_take_the_fewest_bytes(size: int, length: str) -> None:
    """A length is written as in Protocol Buffers: seven bits per byte, in the fewest bytes."""
    raw = payment_request(Network.TEST, SCRIPT, UnixTime(1), UnixTime(2), "", b"\xee" * size)

    assert raw.hex().endswith("2a00" + "3a" + length + "ee" * size)
