"""The application's contract: it says yes or no to a payment that is already durable (RBPCP §13.1)."""

from __future__ import annotations

from hashlib import sha256
from typing import Protocol

from msgspec import Struct

from paychan.protocol.channel import Channel


class ApplicationSilent(Exception):
    """No answer that means anything by the deadline: neither yes nor no. The same question will be asked again."""


class Verdict(Struct, frozen=True):
    """Yes, with text for the client; or no, with the reason."""

    refusal: str = ""
    data: str = ""


def question_key(channel: Channel) -> str:
    """Name the question about `channel.offered`: the same when it is asked again, another for every other offer.

    The sequence number of the record that offered it is another for each offer. After a restore it begins again where the backup was, so the
    payment and what the client sent beside it are named too.
    """
    offered = channel.offered or channel.payment
    said = sha256(offered.signature_with_flag + channel.offered_data.encode()).hexdigest()[:16]
    return f"{channel.outpoint}:{channel.offered_seq}:{said}"


class Application(Protocol):
    """Asked on the event loop; must not block it."""

    async def ask(self, channel: Channel) -> Verdict:
        """Ask about `channel.offered`.

        The question may come again after a crash or a time-out, with the same `question_key`.

        Raises:
            ApplicationSilent: nothing is known of the application's decision.
        """

    async def close(self) -> None:
        """Let go of connections."""
