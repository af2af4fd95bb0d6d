"""The merchant interface over real actors, a real store and a real Unix socket, and a client that pays."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
from msgspec.structs import replace

from paychan.config import Merchant as MerchantSettings
from paychan.config import ServerConfig, load_server_config
from paychan.gateway.cashier import Cashier
from paychan.gateway.charging import Charges
from paychan.gateway.offering import Offering
from paychan.gateway.underway import UnderWay
from paychan.protocol.types import Sat
from paychan.protocol.wire import mpp, x402
from paychan.protocol.wire.offers import CHAINS, Voucher
from paychan.protocol.wire.x402_json import read_required
from tests.gateway.offers import TERMS
from tests.lib.channels import NOW
from tests.lib.world import DebugPayer, Local, local

if TYPE_CHECKING:
    from paychan.gateway.merchant import Merchant

SECRETS = (b"the present secret of 32 bytes..",)
OPENING_SAT = 10_000
LEASE_SECONDS, REPEATS = 100, 2
PAYER = DebugPayer("merchant", movable=True)


class Desk:
    """A server's merchant interface, and a channel of a payer."""

    def __init__(self, server: Local, merchant: Merchant, config: ServerConfig) -> None:
        self.server, self.merchant, self.config = server, merchant, config
        self.steady = 1_000.0
        self.paid_sat = OPENING_SAT

    def voucher(self, paid_sat: int) -> Voucher:
        payment = PAYER.payment(PAYER.funding_sat - paid_sat)
        return Voucher.of(PAYER.outpoint, PAYER.funding_sat, payment)

    def payment(self, headers: Any, more_sat: int = 25, way: str = "x402") -> list[tuple[str, str]]:
        """Pay the offer in the headers of a 402, with `more_sat` more than before."""
        self.paid_sat += more_sat
        found = {name.lower(): value for name, value in headers}
        voucher = self.voucher(self.paid_sat)
        if way == "x402":
            (first,) = x402.offers(read_required(found["payment-required"]))
            return [("PAYMENT-SIGNATURE", x402.payment_header(first, voucher))]
        (challenge,) = mpp.offers([found["www-authenticate"]])
        return [("Authorization", mpp.credential_header(challenge.challenge, voucher))]

    async def credit(self) -> tuple[int, int]:
        """Return what the stored record has beyond the opening: accepted and spent."""
        record = await self.server.stored(PAYER)
        return record.accepted_sat - OPENING_SAT, record.spent_sat - OPENING_SAT


@asynccontextmanager
async def desk(directory: Path, **settings: Any) -> AsyncIterator[Desk]:
    """Run a server with its merchant interface in a directory."""
    from paychan.gateway.merchant import Merchant
    from paychan.gateway.merchant_listener import start_merchant

    file = directory / "server.toml"
    file.write_text(f'network = "test"\ndebug = true\nstate_dir = "{directory}"\n[chain]\nbackend = "debug"\n')
    merchant_settings = MerchantSettings(on=True, lease_seconds=LEASE_SECONDS, repeats=REPEATS, **settings)
    config = replace(load_server_config(file), merchant=merchant_settings)
    async with local(directory) as server:
        await server.open(PAYER, OPENING_SAT)
        terms = replace(TERMS, chain=CHAINS["testnet"], network="testnet", open_price_sat=Sat(OPENING_SAT))
        cashier = Cashier(Charges(server.registry), SECRETS, server.clock)
        under_way = UnderWay(LEASE_SECONDS, REPEATS)
        offering = Offering(terms, lambda: SECRETS)
        merchant = Merchant(cashier, offering, under_way, lambda: float(server.clock()), lambda: found.steady)
        found = Desk(server, merchant, config)
        assert server.clock() == NOW
        listeners = await start_merchant(config, str(file), merchant)
        try:
            yield found
        finally:
            await listeners.close()


def by_socket(found: Desk) -> httpx.AsyncClient:
    """Return a client of the interface's socket."""
    transport = httpx.AsyncHTTPTransport(uds=str(found.config.merchant_socket))
    return httpx.AsyncClient(transport=transport, base_url="http://merchant")
