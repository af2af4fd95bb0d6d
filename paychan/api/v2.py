"""RBPCP v2 in both dialects (RBPCP §6). A client names a channel by its outpoint and its secret."""

from __future__ import annotations

import contextlib
import hmac
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

from msgspec import UNSET

from actors.opening.opener import OpenRequest
from paychan.api.handler import Handler
from paychan.api.negotiation import accepts_rather
from paychan.api.responses import (
    OUTPOINT,
    Answer,
    accept,
    accepted,
    moved,
    outpoint,
    outpoint_of,
    result,
    settlement_transaction,
    settlement_txid,
)
from paychan.api.service import Service
from paychan.chain.base import ChainFailed, Funding
from paychan.protocol.address import decode_address, encode_address
from paychan.protocol.channel import Accepted, Channel, CloseByPayment, Pay, State
from paychan.protocol.errors import (
    ChannelMoved,
    Malformed,
    Missing,
    OutPointMismatch,
    UnknownChannel,
)
from paychan.protocol.keys import parse_public_key
from paychan.protocol.kinds.base import ChannelTerms
from paychan.protocol.kinds.p2sh import parse_redeem_script
from paychan.protocol.settlement import Settlement
from paychan.protocol.types import OutPoint, Sat, UnixTime
from paychan.protocol.wire import bip70
from paychan.protocol.wire.rbpcp import (
    ChannelStatus,
    Dialect,
    FundingInfo,
    PaymentResult,
    V2Payment,
    encode_json,
    opening_secret,
    read_secret,
    read_v2_body,
)

_REQUEST_LIFE_SECONDS = 3600
"""A BIP70 payment request expires after this time."""


_TRANSACTIONS_BYTES = 20_000
"""Bytes of all funding transactions in one answer: clients read 64 KiB, and hex doubles the size."""
_MOST_TRANSACTIONS = 5
"""Funding transactions in one answer; each costs a request to the node."""

_MOVED = {Dialect.S: 318, Dialect.A: 308}
"""RBPCP §6.5: 318 is "same as 308 but adapt the body", an invention of the 2.3.0 document."""

Arguments: TypeAlias = Mapping[str, Sequence[bytes]]
Url: TypeAlias = Callable[[str], str]


class V2Handler(Handler):
    """Base of the resources of v2."""

    quiet_404 = True

    def channel_path(self, outpoint: OutPoint) -> str:
        return _path(outpoint)

    async def find(self, txid: str, vout: str, body: V2Payment) -> Channel:
        """Find the channel that URL, body and secret name; see `_find`."""
        return await _find(self.service, outpoint(txid, vout), self.request.query_arguments, body)


class FundingInfoHandler(V2Handler):
    """`GET /v2/funding/{…}/{…}/info`: expiry and client key in either order (RBPCP §6.1)."""

    def set_default_headers(self) -> None:
        """Say that the answer depends on `Accept` (RFC 9110 12.5.5)."""
        super().set_default_headers()
        self.set_header("Vary", "Accept")

    async def get(self, first: str, second: str) -> None:
        self.limit_rate()
        key_text, expiry_text = (first, second) if len(first) == 66 else (second, first)
        client_key, expiry = parse_public_key(key_text), self.expiry(expiry_text)
        terms = await self.service.opener.offer(client_key, expiry, any_time=self.service.config.debug)
        info = self._info(terms)
        if accepts_rather(self.request.headers.get("Accept", ""), bip70.CONTENT_TYPE, "application/json"):
            self._payment_request(terms, info, self.service.context.now())
        else:
            self.answer(200, None, info)

    def _info(self, terms: ChannelTerms) -> FundingInfo:
        config = self.service.config
        return FundingInfo(
            server_pubkey=terms.server_key.hex(),
            funding_address_copy=terms.funding_address(config.bitcoin_network),
            open_price=Sat(config.open.v2_price_sat),
            funding_tx_min_conf=config.open.min_confirmations,
            settlement_period_hours=config.channel.settlement_period_hours,
            dust_limit=Sat(config.channel.dust_limit_sat),
            min_duration_hours=config.open.min_duration_hours,
            redeem_script_copy=terms.redeem_script.hex(),
        )

    def _payment_request(self, terms: ChannelTerms, info: FundingInfo, now: UnixTime) -> None:
        """Answer with a BIP70 payment request, so that a wallet shows what it pays for (RBPCP §13.3)."""
        self.set_header("Content-Type", bip70.CONTENT_TYPE)
        self.set_header("Content-Transfer-Encoding", "binary")
        self.finish(
            bip70.payment_request(
                self.service.config.bitcoin_network,
                terms.funding_script,
                now,
                UnixTime(now + _REQUEST_LIFE_SECONDS),
                "Funds a payment channel; what is not paid comes back",
                encode_json(info),
            )
        )


class FundingOutputsHandler(V2Handler):
    """`GET /v2/funding/{…}/{…}/outputs`: the unspent outputs at the funding address, and their confirmations.

    With `?transactions=1` the answer also has the transactions of these outputs. A txid commits to the values of the
    outputs, so that a client without a node can check them.
    """

    async def get(self, first: str, second: str) -> None:
        self.limit_rate()
        key_text, expiry_text = (first, second) if len(first) == 66 else (second, first)
        terms = await self.service.opener.terms(parse_public_key(key_text), self.expiry(expiry_text))
        found = await self.service.opener.funding(terms)
        transactions = await self._transactions(found) if self.get_query_argument("transactions", "") == "1" else {}
        context = self.service.context
        now = context.now()
        outputs = [
            {
                "funding_txid": funding.outpoint.txid_hex,
                "funding_vout": funding.outpoint.vout,
                "value": funding.value_sat,
                "confirmations": funding.usable_confirmations,
                "confirmations_needed": context.terms.confirmations_needed(funding.value_sat, now, context.rules),
            }
            | ({"transaction": raw.hex()} if (raw := transactions.get(funding.outpoint.txid)) else {})
            for funding in found
        ]
        address = terms.funding_address(self.service.config.bitcoin_network)
        self.answer(200, None, {"funding_address": address, "outputs": outputs})

    async def _transactions(self, found: Sequence[Funding]) -> dict[bytes, bytes]:
        """Read the funding transactions most valuable first as in `found`, as many as fit into an answer."""
        read: dict[bytes, bytes] = {}
        room = _TRANSACTIONS_BYTES
        outpoints = {funding.outpoint.txid: funding.outpoint for funding in found}
        for txid, at in list(outpoints.items())[:_MOST_TRANSACTIONS]:
            with contextlib.suppress(ChainFailed):  # the answer is useful without the transaction
                transaction = await self.service.context.chain.funding_transaction(at)
                if len(transaction) <= room:
                    read[txid] = transaction
                    room -= len(transaction)
        return read


class ChannelHandler(V2Handler):
    """`POST` opens (RBPCP §6.2), `PUT` pays (RBPCP §6.3)."""

    async def post(self, txid: str, vout: str) -> None:
        self.limit_rate()
        body = await _opening(self.request.body, self.request.query_arguments)
        request = self._open_request(outpoint(txid, vout), body)
        opened = await accept(self.service.opener.open(request))
        self.set_header("Location", self.url(_path(opened.channel.outpoint, opened.channel.secret)))
        self.answer(201, "Channel ready", shown(opened, body.dialect))

    async def put(self, txid: str, vout: str) -> None:
        arguments, body = self.request.query_arguments, self.request.body
        paying = pay(self.service, outpoint(txid, vout), arguments, body, self.url)
        self.give(await paying)

    def _open_request(self, named: OutPoint, body: V2Payment) -> OpenRequest:
        """Check the fields that only the body of an opening has.

        Raises:
            Missing, OutPointMismatch, Malformed: a field is absent, names another outpoint, or can't be read.
        """
        if body.outpoint is None or body.redeem_script is None or body.change_address is None:
            absent = {"funding_txid": body.outpoint, "redeem_script": body.redeem_script}
            raise Missing(field=next((name for name, value in absent.items() if value is None), "change_address"))
        if body.outpoint not in (named, named.reversed):
            raise OutPointMismatch(got=str(body.outpoint), want=str(named))
        terms = parse_redeem_script(body.redeem_script)
        return OpenRequest(
            client_key=terms.client_key,
            expiry=terms.expiry.unix_time,
            change_script=decode_address(body.change_address, self.service.config.bitcoin_network),
            payment=body.payment,
            price_sat=Sat(self.service.config.open.v2_price_sat),
            outpoint=body.outpoint,
            server_key=terms.server_key,
            secret=opening_secret(body.payment),
        )


class CloseHandler(V2Handler):
    """`PUT …/close`: a last payment, which may name a new change address (RBPCP §6.4).

    With `&transaction=1` the answer also has the settlement transaction, which shows the client the fee that the server
    chose.
    """

    async def put(self, txid: str, vout: str) -> None:
        body = read_v2_body(self.request.body)
        channel = await self.find(txid, vout, body)
        script = None
        if body.change_address is not None:
            script = decode_address(body.change_address, self.service.config.bitcoin_network)
        command = CloseByPayment(body.payment, script)
        try:
            closed = await accept(self.service.registry.ask(channel.outpoint, command))
        except ChannelMoved as error:
            self.give(await moved_answer(self.service, channel.outpoint, error, body.dialect, self.url))
            return
        txid_hex = settlement_txid(closed.channel)
        wanted = self.get_query_argument("transaction", "") == "1"
        transaction = settlement_transaction(closed.channel) if wanted else UNSET
        closing = PaymentResult(ChannelStatus.CLOSED, Sat(0), Sat(0), txid_hex, closed.application_data, transaction)
        self.answer(200, "Channel closed", closing)


async def pay(service: Service, named: OutPoint, arguments: Arguments, raw: bytes, url: Url) -> Answer:
    """Process a payment (RBPCP §6.3), or answer with the new place of a channel that moved.

    `url` makes a path absolute.
    """
    body = read_v2_body(raw)
    channel = await find_channel(service, named, arguments)
    try:
        done = accepted(await service.registry.ask(channel.outpoint, payment_command(service, channel, body)))
    except ChannelMoved as error:
        return await moved_answer(service, channel.outpoint, error, body.dialect, url)
    return paid(done, body.dialect)


def paid(done: Accepted, dialect: Dialect) -> Answer:
    """Make the answer to an accepted payment."""
    return result(200, "Payment accepted", shown(done, dialect))


def payment_command(service: Service, channel: Channel, body: V2Payment) -> Pay:
    """Make the command of a payment.

    Raises:
        OutPointMismatch, Malformed: the body names another channel.
    """
    _check_names(channel, body)
    if body.change_address is not None and body.change_address != _change_address(service, channel):
        raise Malformed(field="change_address", reason="not the change address of this channel")
    return Pay(body.payment, body.application_data)


async def moved_answer(service: Service, outpoint: OutPoint, error: ChannelMoved, dialect: Dialect, url: Url) -> Answer:
    """Answer with the new URL of a channel.

    Its secret is the same (RBPCP §6.5: "318 to dialect S, 308 to dialect A").
    """
    new, old = outpoint_of(error), await service.registry.read(outpoint)
    location = url(_path(new, old.secret if old else b""))
    stored = old.closing.settlement if old and old.closing else None
    return moved(error, _MOVED[dialect], location, await _withdrawal(service, new.txid, stored))


async def _withdrawal(service: Service, txid: bytes, stored: Settlement | None) -> bytes | None:
    """Return the transaction that moved a channel: the stored settlement, else from the chain.

    None if the chain fails.
    """
    if stored is not None and stored.txid == txid:
        return stored.transaction
    try:
        return await service.context.chain.transaction(txid)
    except ChainFailed:
        return None


async def _find(service: Service, named: OutPoint, arguments: Arguments, body: V2Payment) -> Channel:
    """Find the channel that URL, secret and body name; for errors see `find_channel` and `_check_names`."""
    channel = await find_channel(service, named, arguments)
    _check_names(channel, body)
    return channel


async def find_channel(service: Service, named: OutPoint, arguments: Arguments) -> Channel:
    """Find the channel that URL and secret name.

    Raises:
        UnknownChannel: there is no such channel, or its secret is another.
    """
    channel = await service.registry.read(named) or await service.registry.read(named.reversed)
    if channel is None:
        raise UnknownChannel
    if not knows_secret(channel, arguments):
        await service.registry.equalise_lookup_cost(channel.outpoint, channel.outpoint.reversed)
        raise UnknownChannel
    return channel


def knows_secret(channel: Channel, arguments: Arguments) -> bool:
    """Return whether the query has the channel's secret."""
    return _is_named(channel.secret, arguments)


def is_secret(secret: bytes, text: str) -> bool:
    """Compare a secret with a caller's text, in every form that `read_secret` reads.

    False if the channel has no secret.
    """
    if text.isascii() and hmac.compare_digest(secret.hex(), text):  # the usual form
        return bool(secret)
    return hmac.compare_digest(secret, read_secret(text) or b"") and bool(secret)


def _check_names(channel: Channel, body: V2Payment) -> None:
    """Compare the channel with the names in a body. Raises `OutPointMismatch` or `Malformed`."""
    if body.outpoint is not None and body.outpoint != channel.outpoint:
        raise OutPointMismatch(got=str(body.outpoint), want=str(channel.outpoint))
    if body.redeem_script is not None and body.redeem_script != channel.terms.redeem_script:
        raise Malformed(field="redeem_script", reason="not the script of this channel")


async def _opening(raw: bytes, arguments: Arguments) -> V2Payment:
    """Read the body of an opening. Raises `UnknownChannel` if the query lacks the secret of that body (RBPCP §6.2)."""
    body = read_v2_body(raw)
    if not _is_named(opening_secret(body.payment), arguments):
        raise UnknownChannel
    return body


def _is_named(secret: bytes, arguments: Arguments) -> bool:
    """Compare a secret with the query parameter `secret`, which must occur exactly once."""
    values = arguments.get("secret", ())
    return is_secret(secret, values[0].decode("latin1") if len(values) == 1 else "")


def _path(outpoint: OutPoint, secret: bytes = b"") -> str:
    """Return the path of a channel, with its secret as the query."""
    return f"/v2/channels/{outpoint.txid_hex}/{outpoint.vout}" + (f"?secret={secret.hex()}" if secret else "")


def _change_address(service: Service, channel: Channel) -> str:
    return encode_address(channel.change_script, service.config.bitcoin_network)


def shown(done: Accepted, dialect: Dialect) -> PaymentResult:
    """Describe the state of a channel.

    While it is open, settlement_txid is `""` in dialect S, null in A (RBPCP §6.6).
    """
    channel = done.channel
    status = ChannelStatus.OPEN if channel.state is State.OPEN else ChannelStatus.CLOSED
    txid = settlement_txid(channel)
    if txid is None and dialect is Dialect.S:
        txid = ""
    return PaymentResult(status, channel.payment.change_sat, done.value_sat, txid, done.application_data)


ROUTES = [
    (r"/v2/funding/([0-9a-zA-Z]+)/([0-9a-zA-Z]+)/info", FundingInfoHandler),
    (r"/v2/funding/([0-9a-zA-Z]+)/([0-9a-zA-Z]+)/outputs", FundingOutputsHandler),
    (rf"/v2/channels/{OUTPOINT}", ChannelHandler),
    (rf"/v2/channels/{OUTPOINT}/close", CloseHandler),
]
