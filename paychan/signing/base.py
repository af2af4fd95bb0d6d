"""The signer's contract, as the server sees it. Each call ends by a deadline and carries meaning, never a hash."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from paychan.protocol.settlement import Claim, Reserve, Settlement
from paychan.protocol.signerwire import HealthReply, KeyReply
from paychan.protocol.types import Sat, UnixTime


class SignerAbsent(Exception):
    """No answer by the deadline, or nobody there. Nothing is known; the same request may be sent again."""


class SignerRefused(Exception):
    """The signer said no: `tag` is stable (`policy-…`), the reason is for people.

    `need_sat` is the least fee it would sign for, where the fee was the reason; else 0.
    """

    def __init__(self, tag: str, reason: str, need_sat: Sat = Sat(0)) -> None:
        super().__init__(f"{tag}: {reason}")
        self.tag = tag
        self.reason = reason
        self.need_sat = need_sat


class Signer(Protocol):
    """All methods raise `SignerAbsent` or `SignerRefused`."""

    async def health(self) -> HealthReply:
        """Ask who the signer is."""

    async def public_key(self, client_key: bytes, expiry: UnixTime) -> KeyReply:
        """Ask for the server key of a channel, and the destination of its settlement."""

    async def reserve_key(self) -> bytes:
        """Ask for the public key (33 bytes) of the coins that may help to pay for settlements."""

    async def sign_settlement(
        self, claims: Sequence[Claim], destination_script: bytes, fee_sat: Sat, reserve: Reserve | None = None
    ) -> Settlement:
        """Ask for a signed settlement; the same request gives the same transaction, another one must pay a higher rate.

        With a reserve the destination is the reserve's script.
        """

    async def sign_child(
        self,
        claims: Sequence[Claim],
        destination_script: bytes,
        fee_sat: Sat,
        child_fee_sat: Sat,
        reserve: Reserve | None = None,
    ) -> Settlement:
        """Ask for a child of the settlement that was signed for these claims, destination, fee and reserve."""

    async def close(self) -> None:
        """Let go of connections."""


async def sign_for_no_less(
    signer: Signer,
    claims: Sequence[Claim],
    destination_script: bytes,
    fee_sat: Sat,
    most_sat: Sat,
    reserve: Reserve | None = None,
) -> Settlement:
    """Sign a settlement; where the signer once signed for as much or more, pay a hundredth more than that.

    It compares by the largest size there can be, records by the real one: a byte of signature must not decide.

    Raises:
        SignerRefused: also when that would be more than `most_sat`.
        SignerAbsent: see `Signer`.
    """
    try:
        return await signer.sign_settlement(claims, destination_script, fee_sat, reserve)
    except SignerRefused as error:
        need_sat = Sat(error.need_sat + error.need_sat // 100)
        if not fee_sat < need_sat <= most_sat:
            raise
        return await signer.sign_settlement(claims, destination_script, need_sat, reserve)
