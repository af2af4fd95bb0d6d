"""`UnixSigner` with the real signer process, and with signers that hang or vanish; `test_lies` has signers that lie."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bitcoin.core import CTransaction

from paychan.protocol.settlement import Reserve
from paychan.protocol.types import Sat, UnixTime
from paychan.protocol.wire.signer_messages import (
    HealthReply,
    KeyRequest,
    Reply,
    Request,
    SettlementRequest,
)
from paychan.signer_client.base import SignerAbsent, SignerBusy, SignerRefused
from paychan.signer_client.unix import UnixSigner
from signer.keys.ring import KeyRing, hardened_keys
from signer.ledger.leveldb import LevelDbLedger
from tests.lib.kernel import interpreter_accepts
from tests.lib.signer_process import REGTEST, SignerProcess
from tests.signer.connected import HANDLER, KEYS, PATIENT, REQUEST, client, served, show, sign, sign_child
from tests.signer.messages import (
    CLIENT_KEY,
    EXPIRY,
    make_claim,
    make_coin,
    make_handler,
    make_request,
    make_reserve_request,
    mutated,
)


def keys_of(running: SignerProcess) -> KeyRing:
    return KeyRing([hardened_keys(running.master)])


# --- the real process -----------------------------------------------------------------------------------------------


async def test_settlement_of_the_real_process_is_valid(tmp_path: Path) -> None:
    """Core's interpreter accepts a settlement that was signed over the socket, and refuses it after a change of one byte."""
    with SignerProcess(tmp_path) as running:
        async with client(running.socket) as signer:
            key = await signer.public_key(CLIENT_KEY, EXPIRY)
            claims = (make_claim(key.server_key), make_claim(key.server_key, change_sat=0, number=1))
            request = SettlementRequest(1, claims, key.destination_script, Sat(5_000))
            await show(signer, request)

            settlement = await sign(signer, request)

            assert await sign(signer, request) == settlement

    raw = settlement.transaction
    for index, claim in enumerate(claims):
        assert interpreter_accepts(claim.terms.funding_script, raw, index, claim.funding_sat)
    for position in range(0, len(raw), 7):
        damaged = raw[:position] + bytes([raw[position] ^ 1]) + raw[position + 1 :]
        assert not all(
            interpreter_accepts(claim.terms.funding_script, damaged, index, claim.funding_sat)
            for index, claim in enumerate(claims)
        ), position


async def test_reserve_and_child_of_the_real_process_are_valid(tmp_path: Path) -> None:
    """Coins of the reserve and children work over the socket, and the interpreter accepts the results."""
    with SignerProcess(tmp_path) as running:
        keys = keys_of(running)
        async with client(running.socket) as signer:
            reserve = Reserve(await signer.reserve_key(), (make_coin(keys, 0), make_coin(keys, 1)))
            request = make_reserve_request(keys)
            assert request.reserve == reserve
            await show(signer, request)

            settlement = await sign(signer, request)
            child = await sign_child(signer, request)

    raw, coins = settlement.transaction, (reserve.funding_script, 20_000)
    spent = [(claim.terms.funding_script, claim.funding_sat) for claim in request.claims] + [coins, coins]
    for index, (script, value_sat) in enumerate(spent):
        assert interpreter_accepts(script, raw, index, value_sat)
    rest = CTransaction.deserialize(raw).vout[1]
    assert interpreter_accepts(reserve.funding_script, child.transaction, 0, rest.nValue)
    assert bytes(CTransaction.deserialize(child.transaction).vin[0].prevout.hash) == settlement.txid


async def test_refusal_tells_the_least_fee(tmp_path: Path) -> None:
    """A refusal for too low a fee rate names the fee that would be signed, and that fee is signed."""
    with SignerProcess(tmp_path) as running:
        request = make_request(keys_of(running))
        async with client(running.socket) as signer:
            await show(signer, request)
            before = await sign(signer, request)
            with pytest.raises(SignerRefused) as refused:
                await sign(signer, mutated(request, "fee_sat", 4_000))

            after = await sign(signer, mutated(request, "fee_sat", refused.value.need_sat))

    assert (refused.value.tag, refused.value.need_sat) == ("policy-replacement", 5_001)
    assert (before.fee_sat, after.fee_sat) == (5_000, 5_001)


async def test_many_calls_share_one_connection(tmp_path: Path) -> None:
    """Concurrent calls get their own replies over one connection."""
    with SignerProcess(tmp_path, f"{REGTEST}[socket]\nmax_connections = 1\n") as running:
        async with client(running.socket) as signer:
            await eventually(signer.health)
            expiries = [UnixTime(EXPIRY + number) for number in range(200)]

            replies = await asyncio.gather(*(signer.public_key(CLIENT_KEY, expiry) for expiry in expiries))

        keys = keys_of(running)
    assert [reply.server_key for reply in replies] == [keys.new(CLIENT_KEY, expiry).public_key for expiry in expiries]


async def eventually(call: Callable[[], Any]) -> Any:
    """Call until the signer answers, as the server does."""
    while True:
        try:
            return await call()
        except SignerAbsent:
            await asyncio.sleep(0.02)


async def test_stopped_signer_is_absent_until_it_goes_on(tmp_path: Path) -> None:
    """While the process is stopped every call ends at its deadline; after SIGCONT the same client is served again."""
    with SignerProcess(tmp_path) as running:
        async with client(running.socket) as patient, client(running.socket, 0.2) as hasty:
            before = await patient.public_key(CLIENT_KEY, EXPIRY)
            running.pause()
            for _ in range(3):
                with pytest.raises(SignerAbsent, match=r"no answer within 0\.2 s"):
                    await hasty.public_key(CLIENT_KEY, EXPIRY)
            with pytest.raises(SignerAbsent):
                await asyncio.wait_for(UnixSigner(running.socket, 0.2).health(), PATIENT)
            running.resume()

            after = await patient.public_key(CLIENT_KEY, EXPIRY)
            again = await eventually(lambda: hasty.public_key(CLIENT_KEY, EXPIRY))

    assert after.server_key == again.server_key == before.server_key


async def test_restarted_signer_is_found_again(tmp_path: Path) -> None:
    """After a stop or a kill, calls say that no signer is there; after the next start the same client is served."""
    with SignerProcess(tmp_path) as running:
        async with client(running.socket) as signer:
            before = await signer.public_key(CLIENT_KEY, EXPIRY)
            for end in (running.stop, running.kill):
                end()
                with pytest.raises(SignerAbsent, match=r"No such file|Connection refused"):
                    await signer.health()
                running.start()
                assert (await signer.public_key(CLIENT_KEY, EXPIRY)).server_key == before.server_key


async def test_restart_between_two_calls_is_not_noticed(tmp_path: Path) -> None:
    """A connection that the signer has closed meanwhile, by a restart or as idle, fails no call."""
    with SignerProcess(tmp_path, f"{REGTEST}[socket]\nidle_seconds = 0.05\n") as running:
        async with client(running.socket) as signer:
            for _ in range(3):
                await signer.health()
                await asyncio.sleep(0.1)
            running.stop()
            running.start()
            await signer.health()


async def test_refusals_come_with_their_tag(tmp_path: Path) -> None:
    """A policy's refusal is a `SignerRefused` with its tag, and the connection stays open."""
    with SignerProcess(tmp_path) as running:
        async with client(running.socket) as signer:
            with pytest.raises(SignerRefused) as refused:
                await sign(signer)
            assert refused.value.tag == "policy-template"
            with pytest.raises(SignerRefused) as refused:
                await signer.public_key(b"\x05" * 33, EXPIRY)
            assert refused.value.tag == "policy-template"
            await signer.health()


async def test_settlement_too_large_for_a_frame_is_refused_here(tmp_path: Path) -> None:
    """A settlement with more claims than a frame can hold is refused before it is sent; concurrent calls are unaffected."""
    claims = [make_claim(REQUEST.claims[0].terms.server_key, change_sat=0, number=n) for n in range(400)]
    async with served(tmp_path, HANDLER) as path, client(path) as signer:
        large = signer.sign_settlement(claims, REQUEST.destination_script, Sat(1))

        results = await asyncio.gather(signer.health(), large, signer.health(), return_exceptions=True)

    assert [type(result) for result in results] == [HealthReply, SignerRefused, HealthReply]


# --- signers that hang or refuse ------------------------------------------------------------------------------------


async def test_policy_deadline_of_a_hanging_key_store(tmp_path: Path) -> None:
    """Requests to a hanging key store end at the deadline and delay no others."""
    release = threading.Event()

    def handle(request: Request) -> Reply:
        if isinstance(request, KeyRequest):
            release.wait(PATIENT)
        return HANDLER(request)

    try:
        async with served(tmp_path, handle, request_seconds=0.2) as path, client(path) as signer:
            hanging = [asyncio.create_task(signer.public_key(CLIENT_KEY, EXPIRY)) for _ in range(24)]
            await asyncio.sleep(0)

            assert (await signer.health()).network == "regtest"

            for call in hanging:
                with pytest.raises(SignerAbsent, match="not done within"):
                    await call
    finally:
        release.set()


async def test_fault_67_key_requests_of_strangers_delay_no_settling(tmp_path: Path) -> None:
    """While 300 key requests for strangers hang in the key store, settlements, their keys, fundings and health are answered.

    Requests above the queue's limit are refused at once, the others at the deadline, and the signer does not count as
    absent.
    """
    release = threading.Event()

    def handle(request: Request) -> Reply:
        if isinstance(request, KeyRequest) and not request.settling:
            release.wait(PATIENT)
        return HANDLER(request)

    try:
        async with served(tmp_path, handle) as path, client(path, 2.0) as signer:
            strangers = [asyncio.create_task(signer.public_key(CLIENT_KEY, EXPIRY)) for _ in range(300)]
            await asyncio.sleep(0.05)
            assert sum(call.done() for call in strangers) == 300 - 256
            assert (await signer.health()).network == "regtest"
            await show(signer, REQUEST)
            assert await sign(signer)
            assert (await signer.public_key(CLIENT_KEY, EXPIRY, settling=True)).server_key
            endings = await asyncio.gather(*strangers, return_exceptions=True)
            assert {type(ending) for ending in endings} == {SignerBusy, SignerAbsent}
            assert await sign(signer)
    finally:
        release.set()


async def test_policy_deadline_of_a_signature_that_hangs(tmp_path: Path) -> None:
    """Hanging signatures end at the deadline; meanwhile keys and fundings are answered."""
    release = threading.Event()

    def handle(request: Request) -> Reply:
        if isinstance(request, SettlementRequest):
            release.wait(PATIENT)
        return HANDLER(request)

    try:
        async with served(tmp_path, handle, request_seconds=0.2) as path, client(path) as signer:
            hanging = [asyncio.create_task(sign(signer)) for _ in range(24)]
            await asyncio.sleep(0)

            await show(signer, REQUEST)
            await signer.public_key(CLIENT_KEY, EXPIRY)

            assert not any(call.done() for call in hanging)
            for call in hanging:
                with pytest.raises(SignerAbsent, match="not done within"):
                    await call
            release.set()
            assert (await sign(signer)).fee_sat == REQUEST.fee_sat
    finally:
        release.set()


async def test_busy_signer_is_absent(tmp_path: Path) -> None:
    """A signer without a free connection may be asked again later; one that refuses this user may not."""
    async with served(tmp_path, HANDLER, max_connections=0) as path, client(path) as signer:
        with pytest.raises(SignerAbsent, match="0 connections are open"):
            await signer.health()


async def test_signer_that_lost_its_ledger_is_absent(tmp_path: Path) -> None:
    """A signer with a failed disk has not judged the request: it may be sent again after a restart."""
    ledger = LevelDbLedger(tmp_path / "ledger", tmp_path / "audit")
    ledger.close()
    handler = make_handler(KEYS, ledger=ledger)
    async with served(tmp_path, handler) as path, client(path) as signer:
        for ask in (sign, sign_child):
            with pytest.raises(SignerAbsent, match="the ledger of what was signed: closed"):
                await ask(signer)
        await signer.reserve_key()


async def test_signer_for_other_users_refuses(tmp_path: Path) -> None:
    """A signer that does not allow this user refuses with that reason."""
    async with served(tmp_path, HANDLER, allowed_uids=frozenset({4242})) as path, client(path) as signer:
        for _ in range(5):
            with pytest.raises(SignerRefused) as refused:
                await signer.health()
            assert refused.value.tag == "policy-peer"


async def test_bug_in_the_signer_is_a_refusal(tmp_path: Path) -> None:
    """A failing handler answers only this request with `protocol-internal`, reveals no data, and continues."""

    def handle(request: Request) -> Reply:
        if isinstance(request, KeyRequest):
            raise TypeError(bytes(32).hex())
        return HANDLER(request)

    async with served(tmp_path, handle) as path, client(path) as signer:
        with pytest.raises(SignerRefused) as refused:
            await signer.public_key(CLIENT_KEY, EXPIRY)
        assert str(refused.value) == "protocol-internal: the signer failed"
        await signer.health()


async def test_no_socket(tmp_path: Path) -> None:
    """Without a socket, a call says at once that no signer is there."""
    async with client(tmp_path / "none.sock") as signer:
        with pytest.raises(SignerAbsent, match=r"none\.sock: No such file"):
            await signer.health()


async def test_closing_ends_calls_in_flight(tmp_path: Path) -> None:
    """`close` ends waiting calls with `SignerAbsent` at once, and no later call connects again."""
    with SignerProcess(tmp_path) as running:
        signer = UnixSigner(running.socket, PATIENT)
        await signer.health()
        running.pause()
        call = asyncio.create_task(signer.health())
        await asyncio.sleep(0.05)

        await signer.close()

        with pytest.raises(SignerAbsent, match="client was closed"):
            await call
        with pytest.raises(SignerAbsent, match="client was closed"):
            await signer.health()


# --- other programs at the socket -------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [b"\xff" * 64, b"HTTP/1.1 200 OK\r\n\r\n", b"\x00\x00\x00\x02\x02\xc0", b"\x00\x00"])
async def test_noise_instead_of_replies_is_absence(tmp_path: Path, noise: bytes) -> None:
    """If another program listens at the socket, the call ends before its deadline."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(4)
        writer.write(noise)
        writer.close()

    server = await asyncio.start_unix_server(answer, path=str(tmp_path / "noise.sock"))
    async with client(tmp_path / "noise.sock") as signer:
        with pytest.raises(SignerAbsent) as absent:
            await signer.health()
    server.close()
    assert "no answer within" not in str(absent.value)


async def test_late_and_foreign_replies_are_dropped(tmp_path: Path) -> None:
    """A reply with an unknown id is dropped."""

    def handle(request: Request) -> Reply:
        shift = 1_000 if isinstance(request, KeyRequest) else 0
        return HealthReply(request.id + shift, "regtest", "hardened", debug=False)

    async with served(tmp_path, handle) as path, client(path, 0.2) as signer:
        with pytest.raises(SignerAbsent, match="no answer within"):
            await signer.public_key(CLIENT_KEY, EXPIRY)
        assert (await signer.health()).network == "regtest"
