"""The operator's interface, on a listener of its own (RBPCP §13.2).

Everything but `/health` needs the token that the server writes to its state directory at start: other users of this
machine may reach the listener, and channels are not theirs to read. `/health` is open for monitors, which read codes; reasons
need the token, too.

Web pages get nothing, not even by a name of their own that leads here (DNS rebinding): a request must name a host that
this listener is reached by, and must not come from another site's page. No answer is stored by a cache.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Sequence
from typing import Any

from msgspec import Struct

from paychan.api.handler import Handler
from paychan.api.management.deposits import deposits
from paychan.api.management.health import health
from paychan.api.responses import OUTPOINT, accepted, number, outpoint, settlement_txid
from paychan.api.service import Service
from paychan.chain.base import ChainFailed
from paychan.protocol.channel import Channel, Close, CloseReason, State
from paychan.protocol.ending import end_of
from paychan.protocol.errors import (
    BackupFailed,
    ChainUnavailable,
    ChannelMoved,
    ChannelMoving,
    CrossSite,
    Malformed,
    Misdirected,
    NoSuchRoute,
    PaychanError,
    Unauthorized,
    UnknownChannel,
)
from paychan.protocol.kinds.script import parse_public_key
from paychan.protocol.types import Network, OutPoint, Sat, UnixTime
from paychan.protocol.withdrawing import can_withdraw
from paychan.store.backup import create as backup
from paychan.store.backup.archive import BackupError
from paychan.store.base import walk

_PAGE = 1000
_HTTP_PORT = 80

_AT_ONCE = 32
"""Channels withdrawn from side by side; the signer and the node answer them in turn anyway."""


class ChannelInfo(Struct, frozen=True):
    """One channel for the operator; the first keys are those of the original's interface."""

    sender: str
    status: str
    value_left: Sat
    expires: UnixTime
    funding_value: Sat
    funding_address: str
    funding_source: str
    settlement_txid: str | None
    value_received: Sat
    payments: int
    opened_at: UnixTime
    version: int
    close_reason: str | None
    settlement_fee: Sat | None
    settlement_transaction: str | None
    spent_by: str | None
    """What took the funding output of a lost channel."""
    moving: bool
    """Something is being withdrawn; the channel takes payments again once that is deep in the chain."""
    moved_to: str | None
    """Outpoint at which it goes on."""


def channel_info(channel: Channel, network: Network) -> ChannelInfo:
    """Show a record."""
    closing = channel.closing
    settlement = closing.settlement if closing else None
    end = end_of(channel) if channel.moves else None
    return ChannelInfo(
        sender=channel.terms.client_key.hex(),
        status=channel.state.value,
        value_left=channel.payment.change_sat,
        expires=channel.terms.expiry,
        funding_value=channel.funding_sat,
        funding_address=channel.terms.funding_address(network),
        funding_source=str(channel.outpoint),
        settlement_txid=settlement_txid(channel),
        value_received=channel.received_sat,
        payments=channel.payments,
        opened_at=channel.opened_at,
        version=2 if channel.secret else 1,
        close_reason=closing.reason.value if closing else None,
        settlement_fee=settlement.fee_sat if settlement else None,
        settlement_transaction=settlement.transaction.hex() if settlement else None,
        spent_by=closing.spent_by[::-1].hex() if closing and channel.state is State.LOST else None,
        moving=isinstance(end, ChannelMoving),
        moved_to=end.fields["outpoint"] if isinstance(end, ChannelMoved) else None,
    )


class ManagementHandler(Handler):
    """Base of the operator's resources; `token` allows changes."""

    def initialize(self, service: Service, token: str) -> None:  # type: ignore[override]
        super().initialize(service)
        self._token = token

    needs_token = True

    def set_default_headers(self) -> None:
        """No CORS here: web pages have no business with the operator's interface."""
        self.set_header("Server", "paychan")
        self.set_header("Content-Type", "application/json")
        self.set_header("Cache-Control", "no-store")

    def prepare(self) -> None:
        super().prepare()
        self._check_origin()
        self.to_operator = self._has_token()
        if self.needs_token and not self.to_operator:
            raise Unauthorized

    def _check_origin(self) -> None:
        """Refuse what a web page may have sent, and what came over a connection that is gone meanwhile."""
        connection: Any = self.request.connection
        if connection.stream.closed():
            raise Misdirected
        headers, allowed = self.request.headers, self._own_hosts()
        if headers.get("Host", next(iter(allowed))).lower() not in allowed:
            raise Misdirected
        origin = headers.get("Origin", "")
        if headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin") or (
            origin and origin.lower().removeprefix("http://") not in allowed
        ):
            raise CrossSite

    def _own_hosts(self) -> set[str]:
        """What a Host may be: this machine's own names, the configured address, the address that was reached; each with the port."""
        connection: Any = self.request.connection
        reached, port = connection.stream.socket.getsockname()[:2]
        names = {"127.0.0.1", "localhost", "::1", self.service.config.management.listen.lower(), reached} - {""}
        shown = {f"[{name}]" if ":" in name else name for name in names}
        return {f"{name}:{port}" for name in shown} | (shown if port == _HTTP_PORT else set())

    def _has_token(self) -> bool:
        given = self.request.headers.get("Authorization", "")
        return hmac.compare_digest(given.encode("latin1", "replace"), f"Bearer {self._token}".encode())

    def info(self, channel: Channel) -> ChannelInfo:
        return channel_info(channel, self.service.config.bitcoin_network)


class NotFoundHandler(ManagementHandler):
    """Everything that is no resource here; web pages don't get to read even that."""

    def prepare(self) -> None:
        super().prepare()
        raise NoSuchRoute


class HealthHandler(ManagementHandler):
    """`GET /health`: who serves, and whether signer and watcher are well; 503 when payments are not accepted.

    Without the token it holds no reasons, see `health.health`.
    """

    needs_token = False

    async def get(self) -> None:
        status, content = await health(self.service, to_operator=self.to_operator)
        self.answer(status, None, content)


class TotalsHandler(ManagementHandler):
    """`GET /totals`: channels and satoshi by state, and what settling costs."""

    async def get(self) -> None:
        self.answer(200, None, await self.service.totals.get())


class ChannelsHandler(ManagementHandler):
    """`GET /channels?state=open&limit=100`: channels of a state, earliest expiry first."""

    async def get(self) -> None:
        name = self.get_query_argument("state", State.OPEN.value)
        if name not in {state.value for state in State}:
            raise Malformed(field="state", reason=f"want one of {', '.join(state.value for state in State)}")
        limit = min(number(self.get_query_argument("limit", "100"), "limit"), _PAGE)
        found = await self.service.context.store.scan(State(name), limit=limit)
        self.answer(200, None, {"channels": [self.info(channel) for channel in found]})


class DepositsHandler(ManagementHandler):
    """`GET /deposits`: what lies at channels' addresses beside what the channels hold."""

    async def get(self) -> None:
        try:
            found = await deposits(self.service.context)
        except ChainFailed as error:
            raise ChainUnavailable(reason=str(error)) from None
        self.answer(200, None, {"deposits": found})


class ClientInfoHandler(ManagementHandler):
    """`GET /channels/{client_pubkey}/info`, as the original had it: the client's channel, open ones first."""

    async def get(self, key: str) -> None:
        channel = await self.service.finder.find(parse_public_key(key))
        if channel is None:
            raise UnknownChannel
        self.answer(200, None, self.info(channel))


class ChannelHandler(ManagementHandler):
    """`GET /channels/{txid}/{vout}`: one channel."""

    async def get(self, txid: str, vout: str) -> None:
        channel = await self.service.registry.read(outpoint(txid, vout))
        if channel is None:
            raise UnknownChannel
        self.answer(200, None, self.info(channel))


class CloseHandler(ManagementHandler):
    """`POST /channels/{txid}/{vout}/close`: the operator closes a channel."""

    async def post(self, txid: str, vout: str) -> None:
        closed = accepted(await self.service.registry.ask(outpoint(txid, vout), Close(CloseReason.OPERATOR)))
        self.answer(200, None, self.info(closed.channel))


class WithdrawHandler(ManagementHandler):
    """`POST /channels/{txid}/{vout}/withdraw`: settle what a channel earned; it goes on at the change output."""

    async def post(self, txid: str, vout: str) -> None:
        self.answer(200, None, self.info(await _withdraw(self.service, outpoint(txid, vout))))


class WithdrawalsHandler(ManagementHandler):
    """`POST /withdraw?above=SAT`: the same for all channels that received so much and can go on, each on its own."""

    async def post(self) -> None:
        above = number(self.parameter("above"), "above")
        if not above:
            raise Malformed(field="above", reason="want at least 1")
        earned = [
            channel async for channel in walk(self.service.context.store, State.OPEN) if channel.received_sat >= above
        ]
        named = [channel.outpoint for channel in earned if can_withdraw(channel)]
        began = await self._withdraw_all(named)
        refused = [(at, error) for at, error in zip(named, began, strict=True) if isinstance(error, PaychanError)]
        self.answer(
            200,
            None,
            {
                "channels": [self.info(moving) for moving in began if isinstance(moving, Channel)],
                "refused": [{"channel": str(at), "code": error.code, "error": str(error)} for at, error in refused],
                "not_withdrawable": len(earned) - len(named),
            },
        )

    async def _withdraw_all(self, named: Sequence[OutPoint]) -> list[Channel | PaychanError]:
        room = asyncio.Semaphore(_AT_ONCE)

        async def one(outpoint: OutPoint) -> Channel | PaychanError:
            async with room:
                try:
                    return await _withdraw(self.service, outpoint)
                except PaychanError as error:
                    return error

        return await asyncio.gather(*map(one, named))


async def _withdraw(service: Service, outpoint: OutPoint) -> Channel:
    """Withdraw from one channel. Raises why that can't be, also if it closes, or closed, for another reason."""
    channel = accepted(await service.registry.ask(outpoint, Close(CloseReason.WITHDRAW))).channel
    if not channel.moves:
        raise end_of(channel)
    return channel


class BackupsHandler(ManagementHandler):
    """`POST /backups`: one consistent moment of the store, in a file, while payments go on."""

    async def post(self) -> None:
        service = self.service
        try:
            path, manifest = await asyncio.to_thread(
                backup.create,
                service.context.store.snapshot,
                service.config.backup_dir,
                service.config.network_name,
                service.context.clock(),
            )
        except BackupError as error:
            raise BackupFailed(reason=str(error)) from None
        self.answer(201, None, {"path": str(path), "manifest": manifest})


ROUTES = [
    (r"/health", HealthHandler),
    (r"/totals", TotalsHandler),
    (r"/channels", ChannelsHandler),
    (r"/deposits", DepositsHandler),
    (r"/channels/([0-9a-fA-F]{66})/info", ClientInfoHandler),
    (rf"/channels/{OUTPOINT}", ChannelHandler),
    (rf"/channels/{OUTPOINT}/close", CloseHandler),
    (rf"/channels/{OUTPOINT}/withdraw", WithdrawHandler),
    (r"/withdraw", WithdrawalsHandler),
    (r"/backups", BackupsHandler),
    (r".*", NotFoundHandler),
]
