"""The two roles of a server: any number of processes could serve one store, and one settles. LevelDB admits one process.

```
 Serving    registry ──▶ actors of channels, opener          takes payments, opens channels, decides to close them
 Settling   planner ◀── actors that close; watcher           signs and publishes settlements, closes before expiry,
            (funding watch, withdrawals); showing            watches outputs and spends, shows payments to the signer
```

A process that has only the first role answers a closing channel as CLOSING; the process that settles goes on from the
record.
"""

from __future__ import annotations

from actors.context import Context
from actors.opening.opener import Opener
from actors.registry import Registry
from actors.settling.planner import SettlementPlanner
from actors.settling.showing import Showing
from actors.watching.expiry import Watcher


class Serving:
    """The role that takes payments and opens channels."""

    def __init__(self, context: Context) -> None:
        self.registry = Registry(context)
        self.opener = Opener(context, self.registry)


class Settling:
    """The role that settles. The channels that `registry` wakes from now on settle through it.

    `show_seconds`: interval at which the signer is shown the newest payments; 0: never. The others are the `Watcher`'s.
    """

    def __init__(
        self,
        context: Context,
        registry: Registry,
        *,
        interval_seconds: float,
        alarm_seconds: int,
        idle_seconds: int,
        stale_seconds: int = 0,
        show_seconds: float = 0,
    ) -> None:
        self.planner = SettlementPlanner(context, registry.read_readable)
        registry.planner = self.planner
        self.watcher = Watcher(
            context,
            registry,
            self.planner,
            interval_seconds=interval_seconds,
            alarm_seconds=alarm_seconds,
            idle_seconds=idle_seconds,
            stale_seconds=stale_seconds,
        )
        self.showing = Showing(context, show_seconds) if show_seconds else None
