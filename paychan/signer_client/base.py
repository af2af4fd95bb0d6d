"""The signer's contract, as the server sees it. Each call ends by a deadline and carries meaning, never a hash."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Protocol

from paychan.protocol.channel import Adopt
from paychan.protocol.settlement import Claim, Reserve, Settlement, without_witness
from paychan.protocol.types import OutPoint, Sat, UnixTime
from paychan.protocol.wire.signer_messages import MAX_CLAIMS, HealthReply, KeyReply, Newest, NewestReply

UNSHOWN = "protocol-funding"
"""Tag of the refusal that asks for the transactions of what is to be spent."""

OUTDATED = "policy-watermark"
"""Tag of the refusal of a payment that is older than one that was signed for."""

TOO_DEAR = "policy-fee"
"""Tag of the refusal of a fee above what the signer allows."""

Transactions = Callable[[bytes], Awaitable[bytes]]
"""`transactions(txid)` returns a transaction, serialized; `Chain.transaction` is one."""


class SignerAbsent(Exception):
    """No answer by the deadline, or nobody there. Nothing is known; the same request may be sent again."""


class SignerBusy(SignerAbsent):
    """Too many questions of strangers wait already: this one was not sent."""

    def __init__(self, waiting: int, limit: int) -> None:
        super().__init__(f"{waiting} questions for keys wait, limit {limit}")
        self.waiting = waiting
        self.limit = limit


class SignerUnfit(SignerAbsent):
    """A signer is there, but it serves something else than this server: nothing is asked of it."""


class SignerRefused(Exception):
    """The signer said no: `tag` is stable (`policy-…`), the reason is for people.

    `need_sat` is a fee that would do, where the fee was the reason: the least, or for `TOO_DEAR` the most; else 0.
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

    async def public_key(self, client_key: bytes, expiry: UnixTime, *, settling: bool = False) -> KeyReply:
        """Ask for the server key of a channel, and the destination of its settlement.

        `settling`: the channel is about to be settled, so that the question is not held up by those of strangers.
        """

    async def other_keys(self, client_key: bytes, expiry: UnixTime, *, settling: bool = False) -> tuple[bytes, ...]:
        """Ask for the server keys that earlier generations have for a channel, the newest first. `settling`: see there."""

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

    async def show_funding(self, transaction: bytes, outputs: Sequence[int]) -> None:
        """Show what these outputs of a transaction hold. It is serialized without witness. Once is enough."""

    async def show_newest(self, claims: Sequence[Claim]) -> NewestReply:
        """Show the newest payments of channels, up to `MAX_CLAIMS`: the signer gives these clients no more from now on."""

    async def behind(self, payments: Sequence[Newest]) -> tuple[OutPoint, ...]:
        """Ask of which of these channels (up to `MAX_CLAIMS`) a settlement was signed, or a newer payment was shown."""

    async def sign_again(self, outpoint: OutPoint) -> Adopt:
        """Ask for the newest claim of this outpoint, and for the newest settlement that was signed for it."""

    async def close(self) -> None:
        """Let go of connections."""


async def news(signer: Signer, payments: Sequence[Newest]) -> list[Adopt]:
    """Return what the signer knows more of these channels than these payments: newer ones, and settlements.

    Raises what `Signer` raises, but one that the signer can not hand out again is left out.
    """
    found = list[Adopt]()
    for begin in range(0, len(payments), MAX_CLAIMS):
        for outpoint in await signer.behind(payments[begin : begin + MAX_CLAIMS]):
            with suppress(SignerRefused):
                found.append(await signer.sign_again(outpoint))
    return found


async def show(signer: Signer, outpoints: Sequence[OutPoint], transactions: Transactions) -> None:
    """Show the signer where coins come from. Raises what `Signer` and `transactions` raise."""
    outputs = defaultdict[bytes, list[int]](list)
    for outpoint in outpoints:
        outputs[outpoint.txid].append(outpoint.vout)
    for txid, indices in outputs.items():
        raw = await transactions(txid)
        await signer.show_funding(without_witness(raw) if raw else raw, indices)


async def sign_for_no_less(
    signer: Signer,
    claims: Sequence[Claim],
    destination_script: bytes,
    fee_sat: Sat,
    most_sat: Sat,
    reserve: Reserve | None = None,
    transactions: Transactions | None = None,
) -> Settlement:
    """Sign a settlement, and show the signer first what it has not seen yet.

    Where it once signed for as much or more, pay a hundredth more than that: it compares by the largest size there can
    be, records by the real one, and a byte of signature must not decide.

    Raises:
        SignerRefused: also when that would be more than `most_sat`, or it wants to see transactions and there are none.
        SignerAbsent: see `Signer`.
        ChainFailed: from `transactions`.
    """
    try:
        return await signer.sign_settlement(claims, destination_script, fee_sat, reserve)
    except SignerRefused as error:
        need_sat = Sat(error.need_sat + error.need_sat // 100)
        if error.tag == UNSHOWN and transactions is not None:
            coins = [coin.outpoint for coin in reserve.coins] if reserve else []
            await show(signer, [claim.outpoint for claim in claims] + coins, transactions)
            return await sign_for_no_less(signer, claims, destination_script, fee_sat, most_sat, reserve)
        if not fee_sat < need_sat <= most_sat:
            raise
        return await signer.sign_settlement(claims, destination_script, need_sat, reserve)
