"""The `value_received` callback over HTTP, as rbpcp-api defined it (RBPCP §13.1)."""

from __future__ import annotations

import asyncio

import httpx
import msgspec
from msgspec import UNSET, Struct, UnsetType

from paychan.callback.base import ApplicationSilent, Verdict, question_key
from paychan.protocol.address import encode_address
from paychan.protocol.channel import Channel
from paychan.protocol.payment import Payment
from paychan.protocol.types import Network, Sat
from paychan.protocol.wire.rbpcp import Dialect, PaymentData, encode_json, payment_data

_MAX_ANSWER_BYTES = 4096


class _FullPayment(Struct, frozen=True):
    payment_data: PaymentData
    application_data: str = ""


class _Question(Struct, frozen=True):
    """The keys of rbpcp-api, and further ones: to recognize a repeated question, and to credit by totals."""

    value_received: Sat
    chan_value_left: Sat
    chan_total_capacity: Sat
    client_pubkey: str
    full_payment: _FullPayment
    channel_id: str
    idempotency_key: str
    received_sat: Sat
    """All that the channel has paid, including this payment."""
    restored: bool
    """The record is from a backup: `value_received` may include payments that the application has accepted before."""


class _Reply(Struct, frozen=True):
    """One key at least: JSON without both is the answer of some other program, and neither yes nor no."""

    resp_app_data: str | UnsetType = UNSET
    resp_app_error: str | UnsetType | None = UNSET


class HttpApplication:
    """Asks with a POST to `{url}/value_received`; follows no redirect, and reads no long answer."""

    def __init__(self, url: str, timeout_seconds: float, network: Network) -> None:
        self._url = url.rstrip("/") + "/value_received"
        self._timeout_seconds = timeout_seconds
        self._network = network
        self._client = httpx.AsyncClient(timeout=timeout_seconds, follow_redirects=False, trust_env=False)
        self._decoder = msgspec.json.Decoder(_Reply)

    async def ask(self, channel: Channel) -> Verdict:
        if channel.offered is None:
            msg = f"nothing is offered on {channel.outpoint}"
            raise ValueError(msg)
        question = self._question(channel, channel.offered)
        headers = {"Content-Type": "application/json", "Idempotency-Key": question.idempotency_key}
        try:
            async with asyncio.timeout(self._timeout_seconds):  # httpx's own time-out restarts with every byte
                reply = self._decoder.decode(await self._post(encode_json(question), headers))
        except (httpx.HTTPError, TimeoutError) as error:
            raise ApplicationSilent(type(error).__name__) from error
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise ApplicationSilent(str(error)) from error
        if reply.resp_app_data is UNSET and reply.resp_app_error is UNSET:
            msg = "an answer without resp_app_data and resp_app_error"
            raise ApplicationSilent(msg)
        if isinstance(reply.resp_app_error, str):
            return Verdict(refusal=reply.resp_app_error or "no reason given")
        return Verdict(data=reply.resp_app_data or "")

    async def close(self) -> None:
        await self._client.aclose()

    async def _post(self, content: bytes, headers: dict[str, str]) -> bytes:
        """Return the body of a 200; stop reading after the longest valid answer."""
        body = b""
        async with self._client.stream("POST", self._url, content=content, headers=headers) as response:
            async for chunk in response.aiter_raw():
                body += chunk
                if len(body) > _MAX_ANSWER_BYTES:
                    break
        if response.status_code != 200 or len(body) > _MAX_ANSWER_BYTES:
            msg = f"status {response.status_code}, {len(body)} bytes"
            raise ApplicationSilent(msg)
        return body

    def _question(self, channel: Channel, offered: Payment) -> _Question:
        data = payment_data(
            offered,
            Dialect.A,
            redeem_script=channel.terms.redeem_script.hex(),
            funding_txid=channel.outpoint.txid_hex,
            funding_vout=channel.outpoint.vout,
            change_address=encode_address(channel.change_script, self._network),
        )
        return _Question(
            value_received=Sat(channel.payment.change_sat - offered.change_sat),
            chan_value_left=offered.change_sat,
            chan_total_capacity=channel.funding_sat,
            client_pubkey=channel.terms.client_key.hex(),
            full_payment=_FullPayment(data, channel.offered_data),
            channel_id=str(channel.outpoint),
            idempotency_key=question_key(channel),
            received_sat=Sat(channel.funding_sat - offered.change_sat),
            restored=channel.restored,
        )
