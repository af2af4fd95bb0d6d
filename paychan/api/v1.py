"""RBPCP v1: a client that follows `Location` and reads reason phrases lives its whole life here (PROTOCOL §5)."""

from __future__ import annotations

from urllib.parse import urlencode

from actors.opening import OpenRequest
from paychan.api.handler import OUTPOINT, Handler, settlement_txid
from paychan.protocol.address import decode_address
from paychan.protocol.channel import Accepted, CloseByProof, Outcome, Pay, State
from paychan.protocol.payment import decode_v1
from paychan.protocol.rest import ChannelStatus, FundingInfo, PaymentResult
from paychan.protocol.scripts import parse_public_key
from paychan.protocol.types import OutPoint, Sat


class V1Handler(Handler):
    """What the resources of v1 share."""

    def channel_path(self, outpoint: OutPoint) -> str:
        return f"/v1/channels/{outpoint.txid_hex}/{outpoint.vout}"

    def result(self, accepted: Accepted) -> PaymentResult:
        """Show a channel as it stands (PROTOCOL §5.5)."""
        channel = accepted.channel
        status = ChannelStatus.OPEN if channel.state is State.OPEN else ChannelStatus.CLOSED
        return PaymentResult(status, channel.payment.change_sat, accepted.value_sat, settlement_txid(channel))


class FundingInfoHandler(V1Handler):
    """`GET /v1/fundingInfo`: server key, address and terms; dates are not looked at here (§5.1)."""

    async def get(self) -> None:
        client_key = parse_public_key(self.parameter("client_pubkey"))
        expiry = self.expiry(self.parameter("exp_time"))
        terms = await self.service.opener.terms(client_key, expiry)
        config = self.service.config
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
    """`POST /v1/channels/new`: open (§5.2). The parameter `test` may say anything."""

    async def post(self) -> None:
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
        opened = self.accepted(await self.service.opener.open(request))
        self.set_header("Location", self.url(self.channel_path(opened.channel.outpoint)))
        ready = opened.channel.state is State.OPEN
        self.answer(201 if ready else 202, "Channel ready" if ready else "Channel closed", self.result(opened))


class ChannelHandler(V1Handler):
    """`PUT` pays (§5.3), `DELETE` with the newest payment closes (§5.4)."""

    async def put(self, txid: str, vout: str) -> None:
        payment = decode_v1(self.parameter("payment"))
        paid = self.accepted(await self._ask(self.outpoint(txid, vout), Pay(payment)))
        still_open = paid.channel.state is State.OPEN
        self.answer(200 if still_open else 202, "Payment accepted", self.result(paid))

    async def delete(self, txid: str, vout: str) -> None:
        payment = decode_v1(self.parameter("payment"))
        closed = self.accepted(await self._ask(self.outpoint(txid, vout), CloseByProof(payment)))
        self.answer(202, "Channel closed", self.result(Accepted(closed.channel, Sat(0))))

    async def _ask(self, outpoint: OutPoint, command: Pay | CloseByProof) -> Outcome:
        """A channel of v2 is named by its secret; here it is unknown."""
        channel = await self.service.registry.read(outpoint)
        if channel is None or channel.secret:
            raise await self.not_found()
        return await self.service.registry.ask(outpoint, command)


class PayHandler(ChannelHandler):
    """`PUT …/pay`, as the document of August 2016 has it; nothing else."""

    SUPPORTED_METHODS = ("PUT", "OPTIONS")


ROUTES = [
    (r"/v1/fundingInfo", FundingInfoHandler),
    (r"/v1/channels/new", NewChannelHandler),
    (rf"/v1/channels/{OUTPOINT}", ChannelHandler),
    (rf"/v1/channels/{OUTPOINT}/pay", PayHandler),
]
