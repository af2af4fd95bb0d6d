"""The application's contract: it accepts or refuses a payment that is already durable (RBPCP §13.1)."""

from __future__ import annotations

from hashlib import sha256
from typing import Protocol

from msgspec import Struct

from paychan.protocol.channel import Channel
from paychan.protocol.types import UnixTime


class ApplicationSilent(Exception):
    """No valid answer by the deadline: the decision is unknown. The server asks the same question again."""


class MessageRefused(ApplicationSilent):
    """The application answered a message with a status other than 2xx; it may take the messages of other channels."""


class Verdict(Struct, frozen=True):
    """Acceptance, with text for the client; or refusal, with the reason."""

    refusal: str = ""
    data: str = ""


class Silence(Struct, frozen=True):
    """No valid answer since this Unix time, and the reason of the last failure."""

    since: UnixTime
    reason: str


def question_key(channel: Channel) -> str:
    """Return the key of the question about `channel.offered`: a repeated question has the same key, each offer its own.

    The sequence number of the record that holds the offer differs for each offer. After a restore the numbers restart
    from the backup, so the key also contains a hash of the payment and of the client's data.
    """
    offered = channel.offered or channel.payment
    said = sha256(offered.signature_with_flag + channel.offered_data.encode()).hexdigest()[:16]
    return f"{channel.outpoint}:{channel.offered_seq}:{said}"


class Application(Protocol):
    """Called on the event loop; must not block it."""

    async def ask(self, channel: Channel) -> Verdict:
        """Ask about `channel.offered`.

        The question may be repeated after a crash or a time-out, with the same `question_key`.

        Raises:
            ApplicationSilent: the application's decision is unknown.
        """

    @property
    def silence(self) -> Silence | None:
        """Since when questions get no valid answer; None if the last one got one."""

    @property
    def silence_to_messages(self) -> Silence | None:
        """Since when messages are not acknowledged; None if the last one was."""

    async def close(self) -> None:
        """Close the connections."""
