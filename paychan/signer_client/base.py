"""The signer's contract for the server.

Each call ends by a deadline; requests carry claims and outputs, never hashes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Protocol

from paychan.protocol.certificate import Certificate
from paychan.protocol.channel import Adopt
from paychan.protocol.settlement import Claim, Reserve, Settlement
from paychan.protocol.tx import without_witness
from paychan.protocol.types import OutPoint, Sat, UnixTime
from paychan.protocol.wire.signer_messages import MAX_CLAIMS, HealthReply, KeyReply, Newest, NewestReply

UNSHOWN = "protocol-funding"
"""Tag of the refusal that asks for the transactions of the outputs to be spent."""

OUTDATED = "policy-watermark"
"""Tag of the refusal of a payment that is older than one that the signer has already signed for."""

TOO_DEAR = "policy-fee"
"""Tag of the refusal of a fee above the signer's limit."""

Transactions = Callable[[bytes], Awaitable[bytes]]
"""`transactions(txid)` returns a transaction, serialized; `Chain.transaction` is one."""


class SignerAbsent(Exception):
    """No answer by the deadline, or no signer on the socket.

    The result is unknown; the same request may be sent again.
    """


class SignerBusy(SignerAbsent):
    """Too many requests for keys of new channels already wait: this one was not sent."""

    def __init__(self, waiting: int, limit: int) -> None:
        super().__init__(f"{waiting} requests for keys wait, limit {limit}")
        self.waiting = waiting
        self.limit = limit


class SignerUnfit(SignerAbsent):
    """A signer answers, but its settings contradict this server's: the server sends it no request."""


class SignerRefused(Exception):
    """The signer refused: `tag` is stable (`policy-…`), the reason is for people.

    `need_sat` is a fee that the signer would accept, if the fee was the reason: the smallest one, or for `TOO_DEAR` the
    largest one; else 0.
    """

    def __init__(self, tag: str, reason: str, need_sat: Sat = Sat(0)) -> None:
        super().__init__(f"{tag}: {reason}")
        self.tag = tag
        self.reason = reason
        self.need_sat = need_sat


class Signer(Protocol):
    """All methods raise `SignerAbsent` or `SignerRefused`."""

    async def health(self) -> HealthReply:
        """Ask for the signer's settings and state."""

    async def public_key(self, client_key: bytes, expiry: UnixTime, *, settling: bool = False) -> KeyReply:
        """Ask for the server key of a channel, and the destination of its settlement.

        `settling`: the channel is about to settle, so this request does not wait behind those for new channels.
        """

    async def other_keys(self, client_key: bytes, expiry: UnixTime, *, settling: bool = False) -> tuple[bytes, ...]:
        """Ask for the server keys of a channel from earlier seeds, the newest first. `settling`: see `public_key`."""

    async def reserve_key(self) -> bytes:
        """Ask for the public key (33 bytes) of the reserve, whose coins may help to pay for settlements."""

    async def certify(self, receipt_key: bytes, not_before: UnixTime, not_after: UnixTime) -> Certificate:
        """Ask the identity key to certify a key for receipts, from about now on and for at most 100 days.

        The returned certificate is valid. `HealthReply.identity_key` is the same key, if the signer was not restarted
        with another seed.
        """

    async def sign_settlement(
        self, claims: Sequence[Claim], destination_script: bytes, fee_sat: Sat, reserve: Reserve | None = None
    ) -> Settlement:
        """Ask for a signed settlement.

        The same request gives the same transaction; another one must pay a higher fee rate.
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
        """Show the signer what these outputs of a transaction hold; once is enough.

        The transaction comes without witness.
        """

    async def show_newest(self, claims: Sequence[Claim]) -> NewestReply:
        """Show the newest payments of up to `MAX_CLAIMS` channels: the signer pays these clients no more from then on."""

    async def behind(self, payments: Sequence[Newest]) -> tuple[OutPoint, ...]:
        """Return those of up to `MAX_CLAIMS` channels with a signed settlement, or with a newer payment that was shown."""

    async def shown(
        self, expires_after: UnixTime, after: OutPoint | None
    ) -> tuple[tuple[OutPoint, ...], OutPoint | None]:
        """Return a page of the channels that were shown and expire later than this; the second value begins the next one.

        None: there is no next page.
        """

    async def sign_again(self, outpoint: OutPoint) -> Adopt:
        """Ask for the newest claim of this outpoint, and for the newest settlement that was signed for it."""

    async def close(self) -> None:
        """Close the connections."""


async def news(signer: Signer, payments: Sequence[Newest]) -> list[Adopt]:
    """Return the newer payments and the settlements of these channels that the signer has beyond these payments.

    Raises what `Signer` raises. A channel whose claim the signer can't return is left out.
    """
    found = list[Adopt]()
    for begin in range(0, len(payments), MAX_CLAIMS):
        for outpoint in await signer.behind(payments[begin : begin + MAX_CLAIMS]):
            with suppress(SignerRefused):
                found.append(await signer.sign_again(outpoint))
    return found


async def show(signer: Signer, outpoints: Sequence[OutPoint], transactions: Transactions) -> None:
    """Show the signer the transactions that created these outputs. Raises what `Signer` and `transactions` raise."""
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
    """Sign a settlement. If the signer lacks the funding transactions, show them first.

    If the signer has signed for the same or a higher rate, pay a hundredth more than that fee: the signer compares by
    the largest possible size and records the real one, and the length of a signature must not decide.

    Raises:
        SignerRefused: also if that fee exceeds `most_sat`, or the signer needs transactions and `transactions` is None.
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
