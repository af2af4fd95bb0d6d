"""`UnixSigner` clients, and signers for them whose replies a test determines."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from paychan.protocol.settlement import Settlement
from paychan.protocol.types import Sat
from paychan.protocol.wire.signer_messages import (
    AgainRequest,
    ChildRequest,
    Reply,
    Request,
    SettlementRequest,
)
from paychan.signer_client.unix import UnixSigner
from signer.judge.handler import Approved, Handler, Step, Wanted
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
    """Answers with the reply of a function; pretends to sign with a slow key store."""

    blocking = True
    threads = 16

    def __init__(self, handle: Callable[[Request], Reply]) -> None:
        self._handle = handle
        self._threads = ThreadPoolExecutor(self.threads)

    def begin(self, request: Request, peer_uid: int) -> Reply | Approved:  # noqa: ARG002
        if not isinstance(request, SettlementRequest | ChildRequest | AgainRequest):
            return self._handle(request)
        written = Future[None]()
        written.set_result(None)
        key = _SayingKey(self._threads, partial(self._handle, request))
        return Approved(written, lambda: Wanted([(key, bytes(32))], lambda _: key.said()))

    def take(self, request: Request, step: Callable[[], Step]) -> Step:  # noqa: ARG002 - as `RequestHandler` has it
        return step()

    def finish(self, request: Request, approved: Approved) -> Reply:
        raise NotImplementedError


class _SayingKey:
    """Signs nothing: when its signature is ready, so is the reply."""

    public_key = bytes(33)

    def __init__(self, threads: ThreadPoolExecutor, say: Callable[[], Reply]) -> None:
        self._threads = threads
        self._say = say

    def sign(self, digest: bytes) -> bytes:
        raise NotImplementedError

    def sign_soon(self, digest: bytes) -> asyncio.Future[bytes]:
        def work() -> bytes:
            self._reply = self._say()
            return digest

        return asyncio.wrap_future(self._threads.submit(work))

    def said(self) -> Reply:
        return self._reply


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
    connections = Connections(answering, Limits(request_seconds=request_seconds, **values))
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
