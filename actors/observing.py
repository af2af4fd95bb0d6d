"""Events of a server, and the observers that receive them; the log is the first.

Doors and actors report to the one `Observers` of the context. An event that no observer wants costs a look-up in a set.
"""

from __future__ import annotations

from typing import Protocol, TypeAlias

import structlog
from msgspec import Struct

from paychan.protocol.channel import Channel
from paychan.protocol.types import OutPoint, Sat
from paychan.store.base import Change

log = structlog.get_logger("observers")


class PaymentBooked(Struct, frozen=True):
    """A write of a channel's record raised the received value: one payment, or several that came together."""

    outpoint: OutPoint
    value_sat: Sat
    received_sat: Sat


class PaymentRefused(Struct, frozen=True):
    """A channel refused a payment; `code` as in the answer."""

    outpoint: OutPoint
    code: str


class RequestRefused(Struct, frozen=True):
    """A door answered a request with a refusal."""

    code: str


class GroupWritten(Struct, frozen=True):
    """One synced write stored the changes of this many channels."""

    changes: int
    seconds: float


class ChannelChanged(Struct, frozen=True):
    """A channel was opened (`before` is None), or its record has another state. The new record is on disk."""

    before: Channel | None
    after: Channel


class PartHealth(Struct, frozen=True):
    """A part (`chain`, `signer`) became unusable for this reason, or usable again: no reason."""

    part: str
    problem: str = ""


Event: TypeAlias = PaymentBooked | PaymentRefused | RequestRefused | GroupWritten | ChannelChanged | PartHealth


class Observer(Protocol):
    """Receives events on the event loop's thread: it must not block. What it raises is logged, and disturbs nothing."""

    @property
    def events(self) -> frozenset[type[Event]]:
        """The kinds of events that it wants; they never change."""

    def observe(self, event: Event) -> None:
        """Receive one event."""


class Observers:
    """Passes each event to the observers that want it."""

    def __init__(self, *observers: Observer) -> None:
        self._observers = observers
        self.wanted = frozenset[type[Event]]().union(*(observer.events for observer in observers))
        """The kinds of events that an observer wants; a caller builds no other in a hot path."""
        self.wants_payments = PaymentBooked in self.wanted
        """Whether each booked payment is reported."""
        self.wants_refusals = PaymentRefused in self.wanted
        """Whether each refused payment is reported."""
        self._health: dict[str, str] = {}
        self._failed = set[tuple[int, type[Event]]]()

    def report(self, event: Event) -> None:
        """Pass an event on. Each observer's first failure with a kind of event is logged."""
        for number, observer in enumerate(self._observers):
            if type(event) not in observer.events:
                continue
            try:
                observer.observe(event)
            except Exception:
                if (number, type(event)) not in self._failed:
                    self._failed.add((number, type(event)))
                    log.exception("an observer failed", observer=type(observer).__name__, kind=type(event).__name__)

    def report_refusal(self, code: str) -> None:
        """Report that a door refused a request."""
        if RequestRefused in self.wanted:
            self.report(RequestRefused(code))

    def report_health(self, part: str, problem: str = "") -> None:
        """Report a part's health, if it is not as before. A part is usable until it is reported otherwise."""
        if self._health.get(part, "") != problem:
            self._health[part] = problem
            self.report(PartHealth(part, problem))

    def report_change(self, change: Change) -> None:
        """Report what a written change means."""
        before, after = change.previous, change.channel
        if before is None or before.state is not after.state:
            self.report(ChannelChanged(before, after))
        gained = Sat(after.received_sat - (before.received_sat if before else 0))
        if gained > 0 and self.wants_payments:
            self.report(PaymentBooked(after.outpoint, gained, after.received_sat))
