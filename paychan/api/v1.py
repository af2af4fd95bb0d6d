"""RBPCP v1 (RBPCP §5). Its clients follow `Location` and read reason phrases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from urllib.parse import urlencode

from actors.opening.opener import OpenRequest
from paychan.api.handler import Handler
from paychan.api.responses import OUTPOINT, Answer, accept, accepted, outpoint, parameter, result, settlement_txid
from paychan.api.service import Service
from paychan.protocol.address import decode_address
from paychan.protocol.channel import Accepted, Channel, CloseByProof, Pay, State
from paychan.protocol.errors import UnknownChannel
from paychan.protocol.keys import parse_public_key
from paychan.protocol.payment import decode_v1
from paychan.protocol.types import OutPoint, Sat
from paychan.protocol.wire.rbpcp import ChannelStatus, FundingInfo, PaymentResult


class V1Handler(Handler):
    """Base of the resources of v1."""

    def channel_path(self, outpoint: OutPoint) -> str:
        return f"/v1/channels/{outpoint.txid_hex}/{outpoint.vout}"


class FundingInfoHandler(V1Handler):
    """`GET /v1/fundingInfo`: server key, funding address and terms, if a channel can be opened (RBPCP §5.1)."""

    async def get(self) -> None:
        self.limit_rate()
        client_key = parse_public_key(self.parameter("client_pubkey"))
        expiry = self.expiry(self.parameter("exp_time"))
        config = self.service.config
        terms = await self.service.opener.offer(client_key, expiry, any_time=config.debug)
        query = urlencode({"client_pubkey": client_key.hex(), "exp_time": expiry})
        self.set_header("Location", self.url(f"/v1/channels/new?{query}"))
        self.answer(
            200,
            None,
            FundingInfo(
                server_pubkey=terms.server_key.hex(),
                funding_address_copy=terms.funding_address(config.bitcoin_network),
                open_price=config.v1_price_sat,
                funding_tx_min_conf=config.open.min_confirmations,
                settlement_period_hours=config.channel.settlement_period_hours,
            ),
        )


class NewChannelHandler(V1Handler):
    """`POST /v1/channels/new`: opens a channel (RBPCP §5.2). The parameter `test` is ignored."""

    async def post(self) -> None:
        self.limit_rate()
        config = self.service.config
        client_key = parse_public_key(self.parameter("client_pubkey"))
        change_script = decode_address(self.parameter("change_address"), config.bitcoin_network)
        expiry = self.expiry(self.parameter("exp_time"))
        request = OpenRequest(
            client_key=client_key,
            expiry=expiry,
            change_script=change_script,
            payment=decode_v1(self.parameter("payment")),
            price_sat=config.v1_price_sat,
        )
        opened = await accept(self.service.opener.open(request))
        self.set_header("Location", self.url(self.channel_path(opened.channel.outpoint)))
        ready = opened.channel.state is State.OPEN
        self.answer(201 if ready else 202, "Channel ready" if ready else "Channel closed", _shown(opened))


class ChannelHandler(V1Handler):
    """`PUT` pays (RBPCP §5.3), `DELETE` with the newest payment closes (RBPCP §5.4)."""

    async def put(self, txid: str, vout: str) -> None:
        paying = pay(self.service, outpoint(txid, vout), self.request.query_arguments)
        self.give(await paying)

    async def delete(self, txid: str, vout: str) -> None:
        payment, named = decode_v1(self.parameter("payment")), outpoint(txid, vout)
        await _find(self.service, named)
        closed = accepted(await self.service.registry.ask(named, CloseByProof(payment)))
        self.answer(202, "Channel closed", _shown(Accepted(closed.channel, Sat(0))))


class PayHandler(ChannelHandler):
    """`PUT …/pay` of the document of August 2016; no other method."""

    SUPPORTED_METHODS = ("PUT", "OPTIONS")


async def pay(service: Service, named: OutPoint, arguments: Mapping[str, Sequence[bytes]]) -> Answer:
    """Process a payment (RBPCP §5.3)."""
    payment = command(arguments)
    await _find(service, named)
    return paid(accepted(await service.registry.ask(named, payment)))


def command(arguments: Mapping[str, Sequence[bytes]]) -> Pay:
    """Read a payment from a query. Raises `Missing`, `Repeated` or `Malformed`."""
    return Pay(decode_v1(parameter(arguments, "payment")))


def paid(done: Accepted) -> Answer:
    """Make the answer to an accepted payment."""
    return result(200 if done.channel.state is State.OPEN else 202, "Payment accepted", _shown(done))


async def _find(service: Service, named: OutPoint) -> Channel:
    """Find a channel of v1. Raises `UnknownChannel`, also for a channel of v2, which needs its secret."""
    channel = await service.registry.read(named)
    if channel is None:
        raise UnknownChannel
    if channel.secret:
        await service.registry.equalise_lookup_cost(named)
        raise UnknownChannel
    return channel


def _shown(done: Accepted) -> PaymentResult:
    """Describe the present state of a channel (RBPCP §5.5)."""
    channel = done.channel
    status = ChannelStatus.OPEN if channel.state is State.OPEN else ChannelStatus.CLOSED
    return PaymentResult(status, channel.payment.change_sat, done.value_sat, settlement_txid(channel))


ROUTES = [
    (r"/v1/fundingInfo", FundingInfoHandler),
    (r"/v1/channels/new", NewChannelHandler),
    (rf"/v1/channels/{OUTPOINT}", ChannelHandler),
    (rf"/v1/channels/{OUTPOINT}/pay", PayHandler),
]
