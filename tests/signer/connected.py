"""`UnixSigner` clients, and signers for them whose replies a test determines."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from paychan.protocol.settlement import Settlement
from paychan.protocol.types import Sat
from paychan.protocol.wire.signer_messages import (
    Reply,
    Request,
    SettlementRequest,
)
from paychan.signer_client.unix import UnixSigner
from signer.judge.handler import Handler
from signer.keys.ring import KeyRing, hardened_keys
from signer.server.connections import Connections, Limits
from signer.server.socket_file import listening_socket
from tests.signer.messages import (
    make_fundings,
    make_handler,
    make_request,
    make_reserve_request,
)

PATIENT = 20.0
KEYS = KeyRing([hardened_keys(bytes(32))])
REQUEST = make_request(KEYS)
WITH_RESERVE = make_reserve_request(KEYS)
HANDLER = make_handler(KEYS, REQUEST, WITH_RESERVE)


class Saying:
    """Answers with the reply of a function, which may block: other requests are answered meanwhile."""

    def __init__(self, handle: Callable[[Request], Reply]) -> None:
        self._handle = handle
        self._threads = ThreadPoolExecutor(32)

    async def handle(self, request: Request, peer_uid: int) -> Reply:  # noqa: ARG002
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._handle, request)


@asynccontextmanager
async def client(path: Path, deadline_seconds: float = PATIENT) -> AsyncIterator[UnixSigner]:
    signer = UnixSigner(path, deadline_seconds)
    try:
        yield signer
    finally:
        await signer.close()


@asynccontextmanager
async def served(
    tmp_path: Path, handle: Callable[[Request], Reply], request_seconds: float = PATIENT, **limits: Any
) -> AsyncIterator[Path]:
    """The signer's own connection code in this process, with any handler behind it."""
    values = {"idle_seconds": PATIENT, "max_connections": 8, "allowed_uids": frozenset({os.geteuid()}), **limits}
    answering = handle if isinstance(handle, Handler) else Saying(handle)
    connections = Connections(answering.handle, Limits(request_seconds=request_seconds, **values))
    path = tmp_path / "served.sock"
    with listening_socket(path, group="") as listener:
        async with asyncio.TaskGroup() as tasks:
            accepting = tasks.create_task(connections.accept(listener))
            try:
                yield path
            finally:
                accepting.cancel()


async def show(signer: UnixSigner, *requests: SettlementRequest) -> None:
    """Show the outputs that these requests spend, as a server does before it asks for a signature."""
    for funding in make_fundings(*requests):
        await signer.show_funding(funding.transaction, funding.outputs)


async def sign(signer: UnixSigner, request: SettlementRequest = REQUEST) -> Settlement:
    return await signer.sign_settlement(request.claims, request.destination_script, request.fee_sat, request.reserve)


async def sign_child(signer: UnixSigner, request: SettlementRequest = REQUEST, fee_sat: int = 2_000) -> Settlement:
    return await signer.sign_child(
        request.claims, request.destination_script, request.fee_sat, Sat(fee_sat), request.reserve
    )
