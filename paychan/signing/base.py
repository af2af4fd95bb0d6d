"""The signer's contract, as the server sees it. Each call ends by a deadline and carries meaning, never a hash."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from paychan.protocol.settlement import Claim, Settlement
from paychan.protocol.signerwire import HealthReply, KeyReply
from paychan.protocol.types import Sat, UnixTime


class SignerAbsent(Exception):
    """No answer by the deadline, or nobody there. Nothing is known; the same request may be sent again."""


class SignerRefused(Exception):
    """The signer said no: `tag` is stable (`policy-…`), the reason is for people."""

    def __init__(self, tag: str, reason: str) -> None:
        super().__init__(f"{tag}: {reason}")
        self.tag = tag
        self.reason = reason


class Signer(Protocol):
    """All methods raise `SignerAbsent` or `SignerRefused`."""

    async def health(self) -> HealthReply:
        """Ask who the signer is."""

    async def public_key(self, client_key: bytes, expiry: UnixTime) -> KeyReply:
        """Ask for the server key of a channel, and the destination of its settlement."""

    async def sign_settlement(self, claims: Sequence[Claim], destination_script: bytes, fee_sat: Sat) -> Settlement:
        """Ask for a signed settlement; the same request gives the same transaction."""

    async def close(self) -> None:
        """Let go of connections."""
