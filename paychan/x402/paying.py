"""The scheme `batch-settlement` for the SDK's clients, paid by channels of the payer's wallet and within its budget.

The SDK calls `before_payment_creation`, then `create_payment_payload`, then `on_payment_response`. The first locks a channel
and decides the payment; the last unlocks it. So requests over one channel wait for each other, as in `paid_client`.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from types import SimpleNamespace
from typing import Any, TypeVar
from urllib.parse import urlsplit

import msgspec
from x402 import x402Client, x402ClientSync
from x402.http import x402HTTPClient, x402HTTPClientSync
from x402.schemas import PaymentPayload as SdkPayload
from x402.schemas import PaymentRequirements, RecoveredResponseResult

from paychan.client.amounts import satoshi
from paychan.client.errors import StillUnpaid
from paychan.client.paying.budget import Budget, host_of
from paychan.client.paying.exchange import Purse
from paychan.client.paying.paying import Request
from paychan.protocol.unpaid import PaymentUnsupported
from paychan.protocol.wire import x402
from paychan.protocol.wire.offers import BINDING, CHAINS, asset_of
from paychan.protocol.wire.x402_json import PaymentRequired, Requirements, SettleResponse
from paychan.x402.conversation import Conversation, Steps, run, run_async

FAMILY = "bip122:*"
UNKNOWN_HOST = "unknown:0"
"""Host of a request whose URL the SDK did not tell. A budget with `hosts` does not pay it."""

UNKNOWN_METHOD = "?"
"""Method of each request in the log: the SDK does not tell it."""

LEASE_SECONDS = 60.0
"""Longest wait for the answer to a payment; then the channel is unlocked, and the payment stays open in the log."""

_T = TypeVar("_T")
_D = TypeVar("_D", PaymentRequired, SettleResponse)


class _Talk:
    """A conversation, with the SDK's objects by which its calls are known."""

    def __init__(self, conversation: Conversation, required: Any) -> None:
        self.conversation, self.required = conversation, required
        self.selected: Any = None
        self.sent: dict[str, Any] = {}
        self.disarm: Callable[[], Any] = lambda: None


class ChannelScheme:
    """Pays offers of the binding `bitcoin-channel-v1`. One instance may serve several clients, tasks and threads.

    Args:
        purse: wallet and budget.
        blocking: for `x402ClientSync`, whose hooks must not be coroutines.
        lease_seconds: see `LEASE_SECONDS`.
    """

    scheme = x402.SCHEME

    def __init__(self, purse: Purse, *, blocking: bool = False, lease_seconds: float = LEASE_SECONDS) -> None:
        self._purse, self._lease_seconds = purse, lease_seconds
        self._talk: ContextVar[_Talk | None] = ContextVar("talk", default=None)
        self._asked: ContextVar[tuple[Any, str] | None] = ContextVar("asked", default=None)
        self.scheme_hooks = SimpleNamespace(
            before_payment_creation=self._before if blocking else self._before_async,
            on_payment_response=self._after if blocking else self._after_async,
        )

    def remember_url(self, context: Any) -> None:
        """Note the URL of a request (`x402HTTPClient.on_payment_required`), by which the budget knows the host."""
        self._asked.set((context.payment_required, context.request_url))

    def create_payment_payload(self, requirements: PaymentRequirements, context: Any = None) -> dict[str, Any]:  # noqa: ARG002
        """Return the payment that `before_payment_creation` decided.

        Raises:
            PaymentUnsupported: the offer is of another binding, or the hook was not called for it.
        """
        _check_binding(requirements)
        talk = self._talk.get()
        payment = talk.conversation.payment if talk is not None and talk.selected is requirements else None
        if talk is None or payment is None:
            raise PaymentUnsupported(field="accepts", got="no payment was decided for this offer", want=BINDING)
        talk.sent = dict(payment.payload)
        named = (payment.extensions or {}).get(x402.IDENTIFIER)
        return {**talk.sent, **({"__extensions": {x402.IDENTIFIER: named}} if named else {})}

    # --- hooks --------------------------------------------------------------------------------------------------------

    def _before(self, context: Any) -> None:
        if steps := self._begin(context):
            self._arm(run(steps))

    async def _before_async(self, context: Any) -> None:
        if steps := self._begin(context):
            self._arm(await run_async(steps))

    def _after(self, context: Any) -> RecoveredResponseResult | None:
        steps = self._answered(context)
        return run(steps) if steps else None

    async def _after_async(self, context: Any) -> RecoveredResponseResult | None:
        steps = self._answered(context)
        return await run_async(steps) if steps else None

    def _begin(self, context: Any) -> Steps[_Talk] | None:
        """Return the steps to a payment; None if it is decided already, as after a correction."""
        selected, talk = context.selected_requirements, self._talk.get()
        _check_binding(selected)
        if talk is not None:
            if talk.required is context.payment_required and talk.conversation.payment is not None:
                talk.selected = selected
                return None
            talk.conversation.end()
        talk = _Talk(Conversation(self._purse, self._request(context.payment_required)), context.payment_required)
        self._talk.set(talk)
        return self._decide(talk, selected)

    def _decide(self, talk: _Talk, selected: Any) -> Steps[_Talk]:
        required = _read(talk.required, PaymentRequired)
        way = msgspec.convert(_plain(selected), Requirements)
        yield from talk.conversation.begin(msgspec.structs.replace(required, accepts=[way]))
        talk.selected = selected
        return talk

    def _answered(self, context: Any) -> Steps[RecoveredResponseResult | None] | None:
        talk = self._talk.get()
        payload = context.payment_payload
        if talk is None or not isinstance(payload, SdkPayload) or payload.payload != talk.sent:
            return None
        return self._take(talk, context)

    def _take(self, talk: _Talk, context: Any) -> Steps[RecoveredResponseResult | None]:
        settled, required = context.settle_response, context.payment_required
        answer = _read(settled, SettleResponse) if settled is not None else _read(required, PaymentRequired)
        talk.sent = {}
        try:
            if (yield from talk.conversation.answered(answer)):
                return RecoveredResponseResult()
        except StillUnpaid:  # the program gets the 402, as from the SDK's own schemes; the log has the reason
            pass
        self._talk.set(None)
        talk.disarm()
        return None

    def _request(self, required: Any) -> Request:
        known = self._asked.get()
        url = known[1] if known is not None and known[0] is required else ""
        parts = urlsplit(url)
        host = host_of(parts.scheme, parts.hostname or "", parts.port) if url else UNKNOWN_HOST
        claimed = required.resource.url if required.resource is not None else ""
        return Request(UNKNOWN_METHOD, url or claimed, host)

    def _arm(self, talk: _Talk) -> None:
        """End the conversation with its task, or after the lease."""
        end: Callable[..., None] = lambda *_: talk.conversation.end()  # noqa: E731
        try:
            task = asyncio.current_task()
        except RuntimeError:
            timer = threading.Timer(self._lease_seconds, end)
            timer.daemon = True
            timer.start()
            talk.disarm = timer.cancel
            return
        assert task is not None
        task.add_done_callback(end)
        handle = asyncio.get_running_loop().call_later(self._lease_seconds, end)

        def disarm() -> None:
            handle.cancel()
            task.remove_done_callback(end)

        talk.disarm = disarm


def own_binding(version: int, ways: list[_T]) -> list[_T]:  # noqa: ARG001 - the SDK's signature of a policy
    """Drop offers of `batch-settlement` on Bitcoin that are of another binding: a policy for `register_policy`."""
    return [way for way in ways if not _is_foreign(way)]


def pay_with(
    client: x402Client | x402ClientSync,
    budget: Budget | Purse,
    wallet: str | os.PathLike[str] | None = None,
    *,
    max_sat: int,
    other_assets: Iterable[dict[str, str]] = (),
    max_amount_per_payment: str | float | bool = "$1",
    lease_seconds: float = LEASE_SECONDS,
) -> Any:
    """Let an SDK's client pay over channels: register scheme, policy and spend controls, and return its HTTP client.

    Give the result to `x402AsyncTransport`, `wrapHttpxWithPayment` or the adapter for requests: it tells the budget the
    host of each request. With the bare client every request is one to `UNKNOWN_HOST`.

    Args:
        client: `x402Client` or `x402ClientSync`; its spend controls are replaced.
        budget: limits of the wallet; or a `Purse`.
        wallet: directory of the channels; default as for `Payer`. Not beside a `Purse`.
        max_sat: highest price of one request in satoshi, or of one unit: the cap of the SDK's spend controls.
        other_assets: further entries of `allowed_assets`.
        max_amount_per_payment: the SDK's limit for default assets of its other schemes.
        lease_seconds: longest wait for an answer while the channel is locked.
    """
    purse = budget if isinstance(budget, Purse) else Purse(budget, wallet)
    scheme = ChannelScheme(purse, blocking=isinstance(client, x402ClientSync), lease_seconds=lease_seconds)
    client.register(FAMILY, scheme)
    client.register_policy(own_binding)
    cap = str(satoshi(max_sat, "max_sat"))
    allowed = [{"network": chain, "asset": asset_of(chain), "max_amount_per_payment": cap} for chain in CHAINS.values()]
    controls: Any = {"allowed_assets": [*allowed, *other_assets], "max_amount_per_payment": max_amount_per_payment}
    client.set_spend_controls(controls)
    http = x402HTTPClientSync(client) if isinstance(client, x402ClientSync) else x402HTTPClient(client)
    http.on_payment_required(scheme.remember_url)
    return http


def _check_binding(way: Any) -> None:
    if _is_foreign(way):
        raise PaymentUnsupported(field="binding", got=str((way.extra or {}).get("binding"))[:80], want=BINDING)


def _is_foreign(way: Any) -> bool:
    if way.scheme != x402.SCHEME or not way.network.startswith(FAMILY[:-1]):
        return False
    return not x402.is_this_binding(msgspec.convert(_plain(way), Requirements))


def _plain(value: Any) -> Any:
    """Return an object of the SDK as plain JSON."""
    return value.model_dump(by_alias=True, exclude_none=True)


def _read(value: Any, kind: type[_D]) -> _D:
    return msgspec.convert(_plain(value), kind)
