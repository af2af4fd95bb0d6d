"""The operator's interface, on a separate listener (RBPCP §13.2).

Every resource but `/health` needs the token that the server writes to its state directory at start, because other users
of the machine may reach the listener and must not read the channels. `/health` is open to monitors and gives them
codes; the reasons need the token.

Web pages have no access, also not through a host name of their own that resolves to this address (DNS rebinding):
`Host` must be a name of this listener, and the request must not come from a page of another site. Caches must not store
the answers.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Sequence

from msgspec import Struct

from paychan.api.handler import Handler
from paychan.api.management.deposits import deposits
from paychan.api.management.health import health
from paychan.api.management.origin import check_origin
from paychan.api.responses import OUTPOINT, accepted, number, outpoint, settlement_txid
from paychan.api.service import Service
from paychan.chain.base import ChainFailed
from paychan.protocol.channel import Channel, Close, CloseReason, State, can_move
from paychan.protocol.ending import end_of
from paychan.protocol.errors import (
    BackupFailed,
    ChainUnavailable,
    ChannelMoved,
    ChannelMoving,
    Malformed,
    NoSuchRoute,
    PaychanError,
    Unauthorized,
    UnknownChannel,
)
from paychan.protocol.keys import parse_public_key
from paychan.protocol.types import Network, OutPoint, Sat, UnixTime
from paychan.protocol.withdrawing import can_withdraw
from paychan.store.backup import create as backup
from paychan.store.backup.archive import BackupError
from paychan.store.base import StoreFailed, walk

_PAGE = 1000

_AT_ONCE = 32
"""Concurrent withdrawals of one request; more gain nothing, as signer and node answer one after the other."""


class ChannelInfo(Struct, frozen=True):
    """One channel for the operator; the first keys are those of the original server's interface."""

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
    """Txid of the transaction that spent the funding output of a lost channel."""
    moving: bool
    """Whether a withdrawal is in progress; the channel accepts payments again once it has enough confirmations."""
    moved_to: str | None
    """Outpoint at which the channel continues."""
    movable: bool
    """Whether the channel can continue after a withdrawal: its change goes back to its own funding address."""


def channel_info(channel: Channel, network: Network) -> ChannelInfo:
    """Describe a channel for the operator."""
    closing = channel.closing
    settlement = closing.settlement if closing else None
    end = end_of(channel) if channel.moves else None
    return ChannelInfo(
        sender=channel.terms.client_key.hex(),
        status=channel.state.value,
        value_left=channel.payment.change_sat,
        expires=channel.terms.expiry.unix_time,
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
        movable=can_move(channel),
    )


class ManagementHandler(Handler):
    """Base of the operator's resources; a request with `token` may read and change channels."""

    def initialize(self, service: Service, token: str) -> None:  # type: ignore[override]
        super().initialize(service)
        self._token = token

    needs_token = True
    serves_clients = False

    def set_default_headers(self) -> None:
        """Set no CORS headers: web pages must not use the operator's interface."""
        self.set_header("Server", "paychan")
        self.set_header("Content-Type", "application/json")
        self.set_header("Cache-Control", "no-store")

    def prepare(self) -> None:
        super().prepare()
        check_origin(self.request, self.service.config.management.listen)
        self.to_operator = self._has_token()
        if self.needs_token and not self.to_operator:
            raise Unauthorized

    def _has_token(self) -> bool:
        authorization = self.request.headers.get("Authorization", "")
        return hmac.compare_digest(authorization.encode("latin1", "replace"), f"Bearer {self._token}".encode())

    def info(self, channel: Channel) -> ChannelInfo:
        return channel_info(channel, self.service.config.bitcoin_network)


class NotFoundHandler(ManagementHandler):
    """Answers 404 to every other path, after the same checks of token and origin."""

    def prepare(self) -> None:
        super().prepare()
        raise NoSuchRoute


class HealthHandler(ManagementHandler):
    """`GET /health`: network, signer, chain, watcher, alarms and tasks; 503 when payments are not accepted.

    Without the token it has no reasons; see `health.health`.
    """

    needs_token = False

    async def get(self) -> None:
        status, content = await health(self.service, to_operator=self.to_operator)
        self.answer(status, None, content)


class TotalsHandler(ManagementHandler):
    """`GET /totals`: number and satoshi of channels by state, and the cost of settling."""

    async def get(self) -> None:
        self.answer(200, None, await self.service.totals.get())


class ChannelsHandler(ManagementHandler):
    """`GET /channels?state=open&limit=100`: channels in a state, earliest expiry first.

    `GET /channels?begins=2fc6` instead finds the channels of all states whose outpoint, txid:vout, begins so.
    """

    async def get(self) -> None:
        limit = min(number(self.get_query_argument("limit", "100"), "limit"), _PAGE)
        if begins := self.get_query_argument("begins", ""):
            found = await self._beginning(begins, limit)
        else:
            found = await self._in_state(limit)
        self.answer(200, None, {"channels": [self.info(channel) for channel in found]})

    async def _in_state(self, limit: int) -> Sequence[Channel]:
        name = self.get_query_argument("state", State.OPEN.value)
        if name not in {state.value for state in State}:
            raise Malformed(field="state", reason=f"want one of {', '.join(state.value for state in State)}")
        return await self.service.context.store.scan(State(name), limit=limit)

    async def _beginning(self, text: str, limit: int) -> Sequence[Channel]:
        """Read the whole store: outpoints are stored with the txid's bytes reversed, so no range holds a beginning."""
        txid, colon, vout = text.lower().partition(":")
        found = []
        for state in State:
            async for channel in walk(self.service.context.store, state):
                has = str(channel.outpoint).partition(":")
                if has[0].startswith(txid) and (has[2] == vout if colon else True):
                    found.append(channel)
                    if len(found) == limit:
                        return found
        return found


class DepositsHandler(ManagementHandler):
    """`GET /deposits`: outputs at channels' addresses that no channel uses."""

    async def get(self) -> None:
        try:
            found = await deposits(self.service.context)
        except ChainFailed as error:
            raise ChainUnavailable(reason=str(error)) from None
        self.answer(200, None, {"deposits": found})


class ClientInfoHandler(ManagementHandler):
    """`GET /channels/{client_pubkey}/info`, as in the original server: the client's channel, open ones first."""

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
    """`POST /channels/{txid}/{vout}/withdraw`: settle the received value.

    The channel continues at its change output.
    """

    async def post(self, txid: str, vout: str) -> None:
        self.answer(200, None, self.info(await _withdraw(self.service, outpoint(txid, vout))))


class WithdrawalsHandler(ManagementHandler):
    """`POST /withdraw?above=SAT`: withdraw from each channel that received at least SAT and can continue."""

    async def post(self) -> None:
        above = number(self.parameter("above"), "above")
        if not above:
            raise Malformed(field="above", reason="want at least 1")
        earned = [
            channel async for channel in walk(self.service.context.store, State.OPEN) if channel.received_sat >= above
        ]
        named = [channel.outpoint for channel in earned if can_withdraw(channel)]
        elsewhere = sum(not can_move(channel) for channel in earned)
        opening_only = len(earned) - len(named) - elsewhere
        began = await self._withdraw_all(named)
        refused = [(at, error) for at, error in zip(named, began, strict=True) if isinstance(error, PaychanError)]
        self.answer(
            200,
            None,
            {
                "channels": [self.info(moving) for moving in began if isinstance(moving, Channel)],
                "refused": [{"channel": str(at), "code": error.code, "error": str(error)} for at, error in refused],
                "not_withdrawable": len(earned) - len(named),
                "not_withdrawable_because": {"change_elsewhere": elsewhere, "opening_only": opening_only},
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
    """Withdraw from one channel.

    Raises a `PaychanError` if that is impossible, also if the channel closes for another reason.
    """
    channel = accepted(await service.registry.ask(outpoint, Close(CloseReason.WITHDRAW))).channel
    if not channel.moves:
        raise end_of(channel)
    return channel


class BackupsHandler(ManagementHandler):
    """`POST /backups`: write a consistent snapshot of the store to a file; payments continue meanwhile."""

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
        except (BackupError, StoreFailed, OSError) as error:
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
