"""Entries of the ledger that one write stores together."""

from __future__ import annotations

from concurrent.futures import Future

from signer.audit.chain import Decision


class Group:
    """Values that are written together, and the future that their callers wait for."""

    __slots__ = ("decisions", "durable", "is_awaited", "values")

    def __init__(self) -> None:
        self.values: dict[bytes, bytes] = {}
        self.decisions: list[Decision] = []
        self.durable = Future[None]()
        self.durable.set_running_or_notify_cancel()  # a caller that cancels must not cancel it for the others
        self.is_awaited = False
        """A caller waits until it is on disk; otherwise it need not be synced."""

    @property
    def is_empty(self) -> bool:
        return not self.values and not self.decisions and not self.is_awaited
