"""`GET /health` on the clients' listener: whether payments are accepted now, for proxies, load balancers and monitors.

It asks neither signer nor node, and says no more than any client learns from a payment. The operator's `/health` says more.
"""

from __future__ import annotations

from typing import Any

from paychan.api.handler import Handler
from paychan.protocol.errors import ChainUnavailable


class ReadinessHandler(Handler):
    """200 while payments are accepted; otherwise the error that a payment would get, a 503 with Retry-After."""

    def get(self) -> None:
        """Answer.

        Raises:
            ChainUnavailable, Unavailable: payments are refused at present.
        """
        context = self.service.context
        problem = context.commits.overload() or self.service.memory.any_work()
        if problem is not None:
            raise problem
        if context.chain_view.problem:
            raise ChainUnavailable(reason=context.chain_view.problem)
        self.answer(200, None, {"status": "ok"})


ROUTES: list[tuple[str, Any]] = [(r"/health", ReadinessHandler)]
