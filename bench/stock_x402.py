"""The stock x402 middleware on FastAPI with its scheme `batch-settlement`, and payments for it: the peer of `gateway.py`.

    PYTHON-OF-ITS-ENVIRONMENT bench/stock_x402.py FILE CHANNELS COUNT

It runs in an environment of its own, which has `x402[fastapi,evm]` and nothing of this project. It writes one line of headers
`PAYMENT-SIGNATURE` to FILE for each channel, signed before the clock starts, then prints its port and serves by uvicorn.

The SDK checks a voucher's signature itself as long as what it knows of the chain is fresh, so no facilitator is asked. Here
it stays fresh for the whole run, the channels are funded from the start, and the storage is the default, in memory: the
middleware has no network, no chain and no disk to wait for.
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import time
from base64 import b64decode, b64encode
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from eth_account import Account
from fastapi import FastAPI, Response
from x402 import x402ResourceServer
from x402.http.middleware.fastapi import payment_middleware
from x402.http.types import PaymentOption, RouteConfig
from x402.mechanisms.evm.batch_settlement.client import BatchSettlementEvmScheme as Payer
from x402.mechanisms.evm.batch_settlement.client.voucher import sign_voucher
from x402.mechanisms.evm.batch_settlement.server import (
    BatchSettlementEvmScheme,
    BatchSettlementEvmSchemeServerConfig,
    InMemoryChannelStorage,
)
from x402.mechanisms.evm.batch_settlement.server.storage import Channel
from x402.mechanisms.evm.batch_settlement.types import VoucherPayload
from x402.mechanisms.evm.batch_settlement.utils import compute_channel_id
from x402.mechanisms.evm.signers import EthAccountSigner
from x402.schemas import PaymentRequirements, SupportedKind, SupportedResponse

NETWORK, ASSET = "eip155:84532", "0x036CbD53842c5426634e7929541eC2318f3dCF7e"
PRICE = 25
BODY = b'{"tile": "' + b"0123456789abcdef" * 8 + b'"}\n'
"""As `small_server.py`."""

_HOUR_SECONDS = 3600


class NoFacilitator:
    """Names what it supports; a voucher never needs more."""

    def get_supported(self) -> SupportedResponse:
        kind = SupportedKind(
            x402_version=2, scheme="batch-settlement", network=NETWORK, extra={"receiverAuthorizer": _address(1)}
        )
        return SupportedResponse(kinds=[kind], extensions=[], signers={})

    async def verify(self, *_: Any) -> Any:
        raise NotImplementedError

    async def settle(self, *_: Any) -> Any:
        raise NotImplementedError


def _address(number: int) -> str:
    return str(Account.from_key(number.to_bytes(32, "big")).address)


def shop(storage: InMemoryChannelStorage) -> FastAPI:
    """Make a FastAPI program with one priced route."""
    server = x402ResourceServer(NoFacilitator())
    settings = BatchSettlementEvmSchemeServerConfig(storage=storage, onchain_state_ttl_ms=_HOUR_SECONDS * 1000)
    server.register(NETWORK, BatchSettlementEvmScheme(_address(2), settings))
    option = PaymentOption(
        scheme="batch-settlement", pay_to=_address(2), price={"amount": str(PRICE), "asset": ASSET}, network=NETWORK
    )
    app = FastAPI()

    @app.get("/v1/item")
    async def item() -> Response:
        return Response(BODY, media_type="application/json")

    @app.get("/free/item")
    async def free() -> Response:
        return Response(BODY, media_type="application/json")

    app.middleware("http")(payment_middleware({"GET /v1/item": RouteConfig(accepts=option)}, server))
    return app


async def requirements(app: FastAPI) -> dict[str, Any]:
    """Return the offer as the middleware writes it."""
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://shop") as client:
        answer = await client.get("/v1/item")
    return dict(json.loads(b64decode(answer.headers["PAYMENT-REQUIRED"]))["accepts"][0])


def headers(storage: InMemoryChannelStorage, offer: dict[str, Any], number: int, count: int) -> list[str]:
    """Fund the channel of one payer, and sign its vouchers."""
    signer = EthAccountSigner(Account.from_key((1000 + number).to_bytes(32, "big")))
    config = Payer(signer).build_channel_config(PaymentRequirements(**offer))
    channel_id, now = compute_channel_id(config, NETWORK), int(time.time() * 1000)
    funded = Channel(
        channel_id=channel_id,
        channel_config=config,
        charged_cumulative_amount="0",
        signed_max_claimable="0",
        signature="0x",
        balance=str(PRICE * count * 2),
        total_claimed="0",
        withdraw_requested_at=0,
        refund_nonce=0,
        onchain_synced_at=now,
        last_request_timestamp=now,
    )
    storage.update_channel(channel_id, lambda _: funded)
    found = []
    for paid in range(1, count + 1):
        payload = VoucherPayload()
        payload.channel_config, payload.voucher = config, sign_voucher(signer, channel_id, PRICE * paid, NETWORK)
        value = {"x402Version": 2, "accepted": offer, "payload": payload.to_dict()}
        found.append(b64encode(json.dumps(value).encode()).decode())
    return found


def main() -> None:
    """Sign, then serve."""
    file, channels, count = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    storage = InMemoryChannelStorage()
    app = shop(storage)
    offer = asyncio.run(requirements(app))
    file.write_text("".join(" ".join(headers(storage, offer, number, count)) + "\n" for number in range(channels)))
    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)
    settings = uvicorn.Config(
        app, loop="uvloop", http="httptools", access_log=False, log_level="warning", timeout_keep_alive=_HOUR_SECONDS
    )
    uvicorn.Server(settings).run([listener])


if __name__ == "__main__":
    main()
