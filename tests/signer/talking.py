"""The signer's socket without a client: frames are sent and read as they are."""

from __future__ import annotations

import socket
from pathlib import Path

from paychan.protocol.wire.signer_messages import (
    FundingReply,
    HealthReply,
    Reply,
    Request,
    SettlementRequest,
    decode_reply,
    encode_frame,
    frame_size,
)
from tests.signer.messages import make_fundings

PATIENCE_SECONDS = 60.0


class _Healthy:
    """Equal to the reply of a healthy signer of these tests to `Health(1)`, at any time of its last write."""

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        identity = (1, "regtest", "hardened", False, "")
        return isinstance(other, HealthReply) and identity == (
            other.id, other.network, other.key_mode, other.debug, other.problem
        )  # fmt: skip


HEALTHY = _Healthy()


def connect(path: Path) -> socket.socket:
    """Connect; wait while the signer's queue is full."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(path))
    connection.settimeout(PATIENCE_SECONDS)
    return connection


def receive(connection: socket.socket) -> Reply | None:
    """The next reply, or None when the signer has closed the connection."""
    with connection.makefile("rb", buffering=0) as file:
        prefix = file.read(4)
        if not prefix:
            return None
        body = b""
        while len(body) < frame_size(prefix):
            body += file.read(frame_size(prefix) - len(body))
        return decode_reply(body)


def ask(path: Path, request: Request | bytes) -> Reply | None:
    with connect(path) as connection:
        connection.sendall(request if isinstance(request, bytes) else encode_frame(request))
        return receive(connection)


def show(path: Path, *requests: SettlementRequest) -> None:
    """Show the outputs that these requests spend, as a server does before it asks for a signature."""
    for funding in make_fundings(*requests):
        assert isinstance(ask(path, funding), FundingReply)
