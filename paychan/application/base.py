"""The application's contract: it says yes or no to a payment that is already durable (PROTOCOL §13.1)."""

from __future__ import annotations

from typing import Protocol

from msgspec import Struct

from paychan.protocol.channel import Channel


class ApplicationSilent(Exception):
    """No answer that means anything by the deadline: neither yes nor no. The same question will be asked again."""


class Verdict(Struct, frozen=True):
    """Yes, with text for the client; or no, with the reason."""

    refusal: str = ""
    data: str = ""


class Application(Protocol):
    """Asked on the event loop; must not block it."""

    async def ask(self, channel: Channel) -> Verdict:
        """Ask about `channel.offered`.

        The question may come again after a crash or a time-out; outpoint and change value are its idempotency key.

        Raises:
            ApplicationSilent: nothing is known of the application's decision.
        """

    async def close(self) -> None:
        """Let go of connections."""
