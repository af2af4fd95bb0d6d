"""BIP70 payment request of a funding address (RBPCP §13.3): unsigned, without a payment URL."""

from __future__ import annotations

from paychan.protocol.types import Network, UnixTime

CONTENT_TYPE = "application/bitcoin-paymentrequest"


def payment_request(
    network: Network, funding_script: bytes, now: UnixTime, expires: UnixTime, memo: str, merchant_data: bytes
) -> bytes:
    """Serialize a PaymentRequest that has only PaymentDetails; the amount is 0, so that the client chooses it."""
    output = _number(1, 0) + _bytes(2, funding_script)
    details = b"".join(
        (
            _bytes(1, b"main" if network is Network.LIVE else b"test"),
            _bytes(2, output),
            _number(3, now),
            _number(4, expires),
            _bytes(5, memo.encode()),
            _bytes(7, merchant_data),
        )
    )
    return _bytes(4, details)


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    """Base-128 number of Protocol Buffers: seven bits per byte, least significant first."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
