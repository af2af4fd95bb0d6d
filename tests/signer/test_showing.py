"""Fundings that a server shows, and settlements that it requests again: over the real socket of the real process."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from bitcoin.core import CTransaction

from paychan.chain.base import ChainFailed
from paychan.protocol.channel import Adopt
from paychan.protocol.settlement import Settlement
from paychan.protocol.types import MAX_MONEY_SAT, OutPoint, Sat
from paychan.protocol.wire.signer_messages import (
    AgainReply,
    FundingReply,
    Health,
    HealthReply,
    Refusal,
    Reply,
    Request,
    SettlementReply,
    SettlementRequest,
    encode_frame,
)
from paychan.signer_client.base import SignerAbsent, SignerRefused, sign_for_no_less
from paychan.signer_client.unix import UnixSigner
from signer.judge.facts import Limits
from signer.keys.ring import KeyRing, hardened_keys
from signer.server.connections import Connections
from signer.server.connections import Limits as PeerLimits
from tests.lib.signer_process import SignerProcess
from tests.signer.connected import HANDLER, KEYS, PATIENT, REQUEST, WITH_RESERVE, client, served, show, sign
from tests.signer.messages import make_fundings, make_handler, make_request, make_reserve_request, mutated

LIMITS = PeerLimits(frozenset({os.geteuid()}), PATIENT, PATIENT, 8)
MOST = Sat(MAX_MONEY_SAT)


class Shown:
    """Transactions of a chain; counts the requests for them."""

    def __init__(self, *requests: SettlementRequest) -> None:
        raws = [funding.transaction for funding in make_fundings(*requests)]
        self._raws = {bytes(CTransaction.deserialize(raw).GetTxid()): raw for raw in raws}
        self.asked: list[bytes] = []

    async def __call__(self, txid: bytes) -> bytes:
        self.asked.append(txid)
        return self._raws[txid]


async def sign_for(
    signer: UnixSigner, request: SettlementRequest, transactions: Callable[[bytes], object] | None
) -> Settlement:
    return await sign_for_no_less(
        signer,
        request.claims,
        request.destination_script,
        request.fee_sat,
        MOST,
        request.reserve,
        transactions,  # type: ignore[arg-type]
    )


# --- showing ----------------------------------------------------------------------------------------------------------


async def test_nothing_is_signed_that_was_not_shown(tmp_path: Path) -> None:
    """A settlement is refused until each funding transaction was shown; then it is signed, also after a restart."""
    with SignerProcess(tmp_path) as running:
        request = make_request(KeyRing([hardened_keys(running.master)]))
        fundings = make_fundings(request)
        async with client(running.socket) as signer:
            for funding in fundings:
                with pytest.raises(SignerRefused) as refused:
                    await sign(signer, request)
                assert refused.value.tag == "protocol-funding"
                await signer.show_funding(funding.transaction, funding.outputs)
                await signer.show_funding(funding.transaction, funding.outputs)  # needed once, harmless twice
            settlement = await sign(signer, request)
            running.kill()
            running.start()

            assert await sign(signer, request) == settlement


async def test_transactions_are_shown_when_they_are_asked_for(tmp_path: Path) -> None:
    """`sign_for_no_less` shows the missing transactions, of the reserve's coins too, and signs; the next time it shows none."""
    with SignerProcess(tmp_path) as running:
        request = make_reserve_request(KeyRing([hardened_keys(running.master)]))
        assert request.reserve
        transactions = Shown(request)
        async with client(running.socket) as signer:
            settlement = await sign_for(signer, request, transactions)
            spent = [claim.outpoint.txid for claim in request.claims]
            spent += [coin.outpoint.txid for coin in request.reserve.coins]
            assert sorted(transactions.asked) == sorted(spent)

            assert await sign_for(signer, request, transactions) == settlement
            assert len(transactions.asked) == len(spent)


async def test_without_transactions_it_stays_refused(tmp_path: Path) -> None:
    """A server that can't show the transactions gets the signer's refusal."""
    async with served(tmp_path, make_handler(KEYS)) as path, client(path) as signer:
        with pytest.raises(SignerRefused) as refused:
            await sign_for(signer, REQUEST, None)
        assert refused.value.tag == "protocol-funding"


async def test_repeated_request_for_transactions_is_a_refusal(tmp_path: Path) -> None:
    """If the signer requests transactions again after they were shown, there is no third try."""
    asked = []

    def handle(request: Request) -> Reply:
        if isinstance(request, SettlementRequest):
            asked.append(request)
            return Refusal(request.id, "protocol-funding", "more")
        return FundingReply(request.id)

    async with served(tmp_path, handle) as path, client(path) as signer:
        with pytest.raises(SignerRefused, match="protocol-funding: more"):
            await sign_for(signer, REQUEST, Shown(REQUEST))
    assert len(asked) == 2


async def test_chain_without_the_transaction_is_reported(tmp_path: Path) -> None:
    """If the chain lacks the transaction, or returns another, nothing is signed."""

    async def fails(txid: bytes) -> bytes:
        msg = "no such transaction"
        raise ChainFailed(msg)

    async def lies(txid: bytes) -> bytes:
        return make_fundings(WITH_RESERVE)[-1].transaction

    async with served(tmp_path, make_handler(KEYS)) as path, client(path) as signer:
        with pytest.raises(ChainFailed, match="no such transaction"):
            await sign_for(signer, REQUEST, fails)
        with pytest.raises(SignerRefused) as refused:
            await sign_for(signer, REQUEST, lies)
        assert refused.value.tag == "protocol-funding"


async def test_only_transactions_can_be_shown(tmp_path: Path) -> None:
    """Garbage, and outputs that a transaction does not have, are refused with policy-template."""
    funding = make_fundings(REQUEST)[0]
    async with served(tmp_path, HANDLER) as path, client(path) as signer:
        for transaction, outputs in ((b"", (0,)), (b"\xff" * 50, (0,)), (funding.transaction, (9,))):
            with pytest.raises(SignerRefused) as refused:
                await signer.show_funding(transaction, outputs)
            assert refused.value.tag == "policy-template"


# --- again -----------------------------------------------------------------------------------------------------------


async def test_newest_settlement_is_signed_again(tmp_path: Path) -> None:
    """For any outpoint of the newest settlement the signer returns that settlement, also after a restart; for others none."""
    with SignerProcess(tmp_path) as running:
        keys = KeyRing([hardened_keys(running.master)])
        request = make_request(keys)
        async with client(running.socket) as signer:
            await show(signer, request)
            await sign(signer, request)
            newest = await sign(signer, mutated(request, "fee_sat", 6_000))
            running.stop()
            running.start()

            for claim in request.claims:
                assert await signer.sign_again(claim.outpoint) == Adopt(claim, newest)
            with pytest.raises(SignerRefused) as refused:
                await signer.sign_again(OutPoint(bytes(32), 0))
            assert refused.value.tag == "policy-template"


AGAIN = HANDLER(REQUEST)
assert isinstance(AGAIN, SettlementReply)
SIGNED = AGAIN.settlement
WRONG = {
    "of another outpoint": None,
    "of another request": None,
    "other txid": msgspec.structs.replace(SIGNED, txid=bytes(32)),
    "no transaction": msgspec.structs.replace(SIGNED, transaction=b"\xff" * 40),
    "empty": msgspec.structs.replace(SIGNED, transaction=b""),
    "the funding": msgspec.structs.replace(SIGNED, transaction=make_fundings(REQUEST)[0].transaction),
}


@pytest.mark.parametrize("lie", WRONG)
async def test_another_settlement_than_requested_is_refused(tmp_path: Path, lie: str) -> None:
    """The reply must agree with its request and its txid, and the request must claim the outpoint."""
    settlement = WRONG.get(lie) or SIGNED
    asked = mutated(REQUEST, "fee_sat", REQUEST.fee_sat + 1) if lie == "of another request" else REQUEST
    outpoint = REQUEST.claims[0].outpoint if lie != "of another outpoint" else OutPoint(bytes(32), 1)
    async with (
        served(tmp_path, lambda request: AgainReply(request.id, asked.claims[0], asked, settlement)) as path,
        client(path) as signer,
    ):
        with pytest.raises(SignerRefused) as refused:
            await signer.sign_again(outpoint)
        assert refused.value.tag == "protocol-reply"


# --- temporary refusals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tag",
    ["policy-deadline", "policy-heartbeat", "policy-rate", "protocol-busy", "protocol-keys", "protocol-ledger"],
)
async def test_temporary_refusals_are_absence(tmp_path: Path, tag: str) -> None:
    """Temporary refusals count as absence: the same request is sent again later, and nothing else is tried."""
    async with (
        served(tmp_path, lambda request: Refusal(request.id, tag, "later")) as path,
        client(path) as signer,
    ):
        for call in (sign(signer), signer.sign_again(OutPoint(bytes(32), 0)), signer.show_funding(b"", (0,))):
            with pytest.raises(SignerAbsent, match="later"):
                await call


async def test_limits_of_the_real_rules_are_absence(tmp_path: Path) -> None:
    """A settlement above the hour's value, or without a heartbeat, waits instead of failing."""
    now = 1_800_000_000.0
    limits = Limits(value_per_hour_sat=1, heartbeat_seconds=3600, value_without_heartbeat_sat=1)
    for changes, reason in (
        (limits, "in the last hour"),
        (msgspec.structs.replace(limits, value_per_hour_sat=0), "heartbeat"),
    ):
        handler = make_handler(KEYS, REQUEST, limits=changes, clock=lambda: now)
        async with served(tmp_path, handler) as path, client(path) as signer:
            with pytest.raises(SignerAbsent, match=reason):
                await sign(signer)


# --- a signer that hangs, or has no free slot -------------------------------------------------------------------------


async def test_calls_after_a_timeout_fail_at_once(tmp_path: Path) -> None:
    """After a call has timed out, later calls fail at once until the signer has answered."""
    with SignerProcess(tmp_path) as running:
        async with client(running.socket, 1.0) as signer:
            await signer.reserve_key()
            running.pause()
            with pytest.raises(SignerAbsent, match=r"no answer within 1\.0 s$"):
                await signer.reserve_key()

            loop = asyncio.get_running_loop()
            begun = loop.time()
            for _ in range(1000):
                with pytest.raises(SignerAbsent, match="lately, and none since"):
                    await signer.reserve_key()
            assert loop.time() - begun < 20.0  # each until its deadline would take a thousand seconds

            running.resume()
            while True:
                try:
                    await signer.reserve_key()
                    break
                except SignerAbsent:
                    await asyncio.sleep(0.01)


async def test_hanging_signer_that_dies_is_found_again(tmp_path: Path) -> None:
    """A signer that hung, was killed and started again is used again without any intervention."""
    with SignerProcess(tmp_path) as running:
        async with client(running.socket, 2.0) as signer:
            await signer.reserve_key()
            running.pause()
            with pytest.raises(SignerAbsent):
                await signer.reserve_key()
            running.kill()
            running.start()
            while True:
                try:
                    await signer.reserve_key()
                    break
                except SignerAbsent:
                    await asyncio.sleep(0.01)


async def test_closed_connection_fails_no_call(tmp_path: Path) -> None:
    """A signer that closes a new connection before its reply, to make room, is tried again."""
    reply = HealthReply(1, "regtest", "hardened", debug=False)  # the first id of a client, also in a retry
    connections = 0

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        if connections > 3:
            await reader.readexactly(len(encode_frame(Health(1))))
            writer.write(encode_frame(reply))
        writer.close()

    server = await asyncio.start_unix_server(answer, path=str(tmp_path / "crowded.sock"))
    async with server, client(tmp_path / "crowded.sock") as signer:
        assert await signer.health() == reply
    assert connections == 4


async def test_full_queue_is_waited_for(tmp_path: Path) -> None:
    """A signer that accepts nothing, with a full queue, is absent at the deadline; when it accepts, the call succeeds."""
    path = tmp_path / "full.sock"
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as first:
        listener.bind(str(path))
        listener.listen(0)
        first.connect(str(path))
        async with client(path, 0.3) as hasty, client(path) as patient:
            with pytest.raises(SignerAbsent, match="no answer within"):
                await hasty.health()
            call = asyncio.create_task(patient.health())
            await asyncio.sleep(0.1)
            assert not call.done()
            connections = Connections(HANDLER.handle, LIMITS)
            serving = asyncio.create_task(connections.accept(listener))

            assert (await call).network == "regtest"

            serving.cancel()
