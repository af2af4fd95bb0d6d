"""The parts that gateway and merchant interface have in common: a cashier, and offers with the server's identity key."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
from pathlib import Path

import structlog
from msgspec.structs import replace

from actors.context import wall_clock
from paychan.api.service import Service
from paychan.gateway.cashier import Cashier
from paychan.gateway.charging import Charges
from paychan.gateway.offering import Offering
from paychan.protocol.errors import PaychanError
from paychan.protocol.types import Network, Sat
from paychan.protocol.wire.offers import CHAINS, Offer
from paychan.supervisor import Supervised

log = structlog.get_logger("gateway")

_WORDS = {Network.LIVE: "mainnet", Network.REGTEST: "regtest", Network.TEST: "testnet"}
_SECRET_BYTES = 32
_PATIENCE_SECONDS = 1.0


class Counter:
    """Cashier and offers of one server. `pay_url` is where clients open channels, without a slash at the end."""

    def __init__(self, service: Service, pay_url: str) -> None:
        self._service = service
        self._secrets = _secrets(service.config.state_dir / "gateway.secrets")
        self._terms = _terms(service, pay_url)
        self._identity: Supervised | None = None
        self._is_known = asyncio.Event()
        self.cashier = Cashier(Charges(service.registry), self._secrets, wall_clock)
        self.offering = Offering(self._terms, lambda: self._secrets)

    async def start(self) -> None:
        """Ask the signer for the identity key, and wait for it a moment; an absent signer delays the start no longer."""
        self._identity = self._service.supervisor.run("gateway identity", self._learn_identity, endless=False)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_PATIENCE_SECONDS):
                await self._is_known.wait()

    async def close(self) -> None:
        if self._identity is not None:
            await self._identity.stop()

    async def _learn_identity(self, task: Supervised) -> None:
        """Ask the signer for the identity key; until it is known, nothing is offered."""
        while not self._terms.identity:
            try:
                identity = (await self._service.context.signer.health()).identity_key
            except PaychanError as error:
                log.warning("offers wait for the signer", reason=str(error))
                await asyncio.sleep(1)
                continue
            self._terms = replace(self._terms, identity=identity)
            self.offering.terms = self._terms
            self._is_known.set()
            task.succeeded()


def _terms(service: Service, pay_url: str) -> Offer:
    """Return what every offer has in common; the identity key is not known yet."""
    config, rules = service.config, service.context.rules
    network = _WORDS[config.bitcoin_network]
    return Offer(
        amount_sat=Sat(0),
        unit="request",
        chain=CHAINS[network],
        identity=b"",
        pay_url=pay_url,
        network=network,
        open_price_sat=config.opening_terms.v2_price_sat,
        min_confirmations=rules.min_confirmations,
        settlement_period_seconds=rules.settlement_period_seconds,
        dust_sat=rules.dust_sat,
        realm="",
    )


def _secrets(path: Path) -> tuple[bytes, ...]:
    """Read the keys of challenges, one in a line as hex, the newest first; draw one if there is no file.

    To change the key, write a new line above the old one, and remove the old one some minutes later.
    """
    try:
        return tuple(bytes.fromhex(line) for line in path.read_text().split())
    except FileNotFoundError:
        drawn = secrets.token_bytes(_SECRET_BYTES)
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(drawn.hex() + "\n")
    except OSError as error:  # challenges of this process hold until it ends
        log.warning("challenges end with this process", file=str(path), reason=error.strerror)
    return (drawn,)
