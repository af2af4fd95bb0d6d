"""The method `bitcoin`/`session` for the SDK's clients, paid by channels of the payer's wallet and within its budget.

The SDK repeats a request up to three times, each with a new credential. The wallet sees each further 402 as the answer to its
payment: it corrects one that is proven, and otherwise stops. It learns of success and failure by the SDK's events; an answer
with another status, such as 404, has no event: its payment stays open in the log, and the same request sends it again.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress
from contextvars import ContextVar
from hashlib import sha256
from typing import Any, TypeVar

import httpx
from mpp import Challenge as SdkChallenge
from mpp.client.transport import Mpp, PaymentTransport
from mpp.errors import PaymentOutcomeUnknownError
from mpp.events import CHALLENGE_RECEIVED, PAYMENT_FAILED, PAYMENT_RESPONSE
from mpp.runtime import ClientMethod, CredentialParams

from paychan.client.errors import ClientError, StillUnpaid
from paychan.client.paying.budget import Budget, host_of
from paychan.client.paying.exchange import Answer, Bill, Purse, look_at
from paychan.client.paying.paying import Request
from paychan.mpp.conversation import Conversation
from paychan.mpp.method import SESSION
from paychan.protocol.errors import PaychanError
from paychan.protocol.wire import mpp
from paychan.protocol.wire.challenge_header import FIELD
from paychan.protocol.wire.mpp_challenge import Challenge, challenge_header
from paychan.protocol.wire.offers import Offer

LEASE_SECONDS = 60.0
"""Longest wait for the answer to a payment; then the channel is unlocked, and the payment stays open in the log."""

_TALK = "paychan"
"""Extension of a request with its conversation, and of a paid response with its `Bill`."""
_KEY = "Idempotency-Key"

_Engine = TypeVar("_Engine", PaymentTransport, Mpp)


class _Talk:
    """The conversation of a request of the SDK."""

    def __init__(self, request: httpx.Request, conversation: Conversation, task: asyncio.Task[Any]) -> None:
        self.request, self.conversation, self.task = request, conversation, task
        self.channel = ""
        self._has_key = False
        self._lease: asyncio.TimerHandle | None = None
        request.extensions[_TALK] = self
        task.add_done_callback(self.end)

    def pay(self, headers: dict[str, str], lease_seconds: float) -> str:
        """Name the request, begin the lease, and return the credential."""
        text = headers.get("Authorization") or headers["Payment-Authorization"]
        credential = mpp.read_credential(text)
        assert credential is not None
        self.channel = credential.payload["channelId"]
        if _KEY in headers:
            self.request.headers[_KEY], self._has_key = headers[_KEY], True
        self._disarm()
        self._lease = asyncio.get_running_loop().call_later(lease_seconds, self.end)
        return text

    def end(self, _: object = None) -> None:
        """Unlock the channel, and leave the request as the program made it."""
        self._disarm()
        self.task.remove_done_callback(self.end)
        self.conversation.end()
        if self.request.extensions.get(_TALK) is self:
            del self.request.extensions[_TALK]
        if self._has_key:
            self._has_key = False
            self.request.headers.pop(_KEY, None)

    def _disarm(self) -> None:
        if self._lease is not None:
            self._lease.cancel()


class ChannelPayments:
    """A wallet for clients of the SDK: `method` creates credentials, and `watch` reads the answers.

    Args:
        purse: wallet and budget.
        lease_seconds: see `LEASE_SECONDS`.
    """

    def __init__(self, purse: Purse, *, lease_seconds: float = LEASE_SECONDS) -> None:
        self._purse, self._lease_seconds = purse, lease_seconds
        self._asked: ContextVar[dict[str, Any] | None] = ContextVar("asked", default=None)
        self._newest: ContextVar[_Talk | None] = ContextVar("newest", default=None)
        self.method = ClientMethod(
            method=SESSION, create_credential=self._create, can_handle_challenge=lambda each: _offer(each) is not None
        )

    def watch(self, engine: _Engine) -> _Engine:
        """Listen to the events of a transport or client of the SDK that has `method`, and return it."""
        engine.on(CHALLENGE_RECEIVED, self._remember)
        engine.on(PAYMENT_RESPONSE, self._answered)
        engine.on(PAYMENT_FAILED, self._failed)
        return engine

    def _remember(self, event: dict[str, Any]) -> None:
        if event["method"] is self.method:
            self._asked.set(event)

    async def _create(self, params: CredentialParams) -> str:
        """Decide a payment, and return its credential. Raises as `exchange`, and `RuntimeError` if none watches."""
        asked, shown = self._asked.get(), _echo(params.challenge)
        if asked is None or asked["challenge"] is not params.challenge:
            msg = "no event named the request of this challenge: call watch(transport) of ChannelPayments"
            raise RuntimeError(msg)
        request: httpx.Request = asked["request"]
        talk = _talk_of(request)
        if talk is None:
            talk = self._begin(request)
        answer = Answer(402, ((FIELD.lower(), challenge_header(shown)),))
        try:
            said = await talk.conversation.tell(answer)
        except StillUnpaid as error:
            talk.end()
            if not error.code:  # the SDK shows no body of a 402, which would name the reason
                await asyncio.to_thread(self._look, talk.channel)
            raise
        except BaseException:
            talk.end()
            raise
        if not said or isinstance(said, Bill):
            talk.end()
            msg = f"challenge {shown.id!r} has no offer of {SESSION.key} that can be read"
            raise ValueError(msg)
        return talk.pay(dict(said), self._lease_seconds)

    def _begin(self, request: httpx.Request) -> _Talk:
        """Begin a conversation. It ends with its task, after the lease, or with the next request of the task."""
        task = asyncio.current_task()
        assert task is not None
        newest = self._newest.get()
        if newest is not None and newest.task is task:
            newest.end()
        talk = _Talk(request, Conversation(self._purse, _read(request)), task)
        self._newest.set(talk)
        return talk

    async def _answered(self, event: dict[str, Any]) -> None:
        """Note the answer of a paid request: the wallet's mark moves here."""
        response: httpx.Response = event["response"]
        talk = _talk_of(event["request"]) if event["method"] is self.method else None
        if talk is None:
            return
        headers = tuple((name.lower(), value) for name, value in response.headers.multi_items())
        try:
            bill = await talk.conversation.tell(Answer(response.status_code, headers))
        finally:
            talk.end()
        if isinstance(bill, Bill):
            response.extensions[_TALK] = bill

    async def _failed(self, event: dict[str, Any]) -> None:
        """End a conversation whose answer was lost; an answer of status 5xx may have a receipt."""
        if not isinstance(event["error"], PaymentOutcomeUnknownError):
            return
        if event["response"].is_server_error:
            await self._answered(event)
        elif (talk := _talk_of(event["request"])) is not None and event["method"] is self.method:
            talk.end()

    def _look(self, channel: str) -> None:
        """Ask the channel's own server whether it has ended, so that the wallet pays over another one next."""
        for record in self._purse.wallet.read_all()[0]:
            if record.funding_outpoint == channel:
                with suppress(ClientError, PaychanError):
                    file, newest = self._purse.wallet.open(record.name)
                    try:
                        look_at(file, newest)
                    finally:
                        file.release()


def pay_with(
    budget: Budget | Purse,
    wallet: str | os.PathLike[str] | None = None,
    *,
    lease_seconds: float = LEASE_SECONDS,
    **options: Any,
) -> PaymentTransport:
    """Return the SDK's transport for `httpx.AsyncClient`; it pays over channels of the wallet.

    Args:
        budget: limits of the wallet; or a `Purse`.
        wallet: directory of the channels; default as for `Payer`. Not beside a `Purse`.
        lease_seconds: longest wait for an answer while the channel is locked.
        options: settings of `PaymentTransport`, such as `inner` and `allowed_origins`.
    """
    purse = budget if isinstance(budget, Purse) else Purse(budget, wallet)
    payments = ChannelPayments(purse, lease_seconds=lease_seconds)
    return payments.watch(PaymentTransport([payments.method], **options))


def _talk_of(request: httpx.Request) -> _Talk | None:
    talk = request.extensions.get(_TALK)
    return talk if isinstance(talk, _Talk) and talk.request is request else None


def _read(request: httpx.Request) -> Request:
    url = request.url
    return Request(
        request.method,
        str(url),
        host_of(url.scheme, url.raw_host.decode("ascii"), url.port),
        frozenset(name.lower() for name in request.headers),
        sha256(request.content).digest(),
    )


def _echo(shown: SdkChallenge) -> Challenge:
    """Return a challenge with its own `request`, as received."""
    echo = shown.to_echo()
    return Challenge(
        echo.id,
        echo.realm,
        echo.method,
        echo.intent,
        echo.request,
        echo.expires,
        echo.digest,
        echo.description,
        echo.header,
        echo.opaque,
    )


def _offer(shown: SdkChallenge) -> Offer | None:
    try:
        return mpp.offer_of(_echo(shown))
    except PaychanError:
        return None
