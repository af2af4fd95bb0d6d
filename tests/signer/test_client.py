"""`UnixSigner` against the real signer process, and against signers that lie, hang or vanish."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from bitcoin.core import CTransaction, CTxIn, CTxOut
from coincurve import PublicKey

from paychan.protocol.address import key_script
from paychan.protocol.settlement import Settlement, sign_settlement
from paychan.protocol.signerwire import (
    HealthReply,
    KeyReply,
    KeyRequest,
    Reply,
    Request,
    SettlementReply,
    SettlementRequest,
)
from paychan.protocol.types import Sat, UnixTime
from paychan.signing.base import SignerAbsent, SignerRefused
from paychan.signing.unix import UnixSigner
from signer.connections import WORKERS, Connections, Limits
from signer.handlers import Handler
from signer.keys import Keys, hardened_keys
from tests.lib.kernel import interpreter_accepts
from tests.lib.ledger import MemoryLedger
from tests.lib.signer_process import REGTEST, SignerProcess
from tests.signer.messages import CLIENT_KEY, EXPIRY, make_claim, make_request, mutated, with_high_s, with_padded_s

PATIENT = 20.0
KEYS = hardened_keys(bytes(32))
HANDLER = Handler(KEYS, MemoryLedger(), "regtest", "hardened", debug=False)
HEALTH = HealthReply(1, "regtest", "hardened", debug=False)
REQUEST = make_request(KEYS)


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
    connections = Connections(handle, Limits(request_seconds=request_seconds, **values))
    path = tmp_path / "served.sock"
    server = await asyncio.start_unix_server(connections.serve, path=str(path))
    try:
        yield path
    finally:
        server.close()
        connections.close()


async def sign(signer: UnixSigner, request: SettlementRequest = REQUEST) -> Settlement:
    return await signer.sign_settlement(request.claims, request.destination_script, request.fee_sat)


# --- the real process -----------------------------------------------------------------------------------------------


async def test_settlement_of_the_real_process_is_valid(tmp_path: Path) -> None:
    """Core's interpreter accepts a settlement made over the socket, and refuses it once a byte is changed."""
    with SignerProcess(tmp_path) as running:
        async with client(running.socket) as signer:
            key = await signer.public_key(CLIENT_KEY, EXPIRY)
            claims = [make_claim(key.server_key), make_claim(key.server_key, change_sat=0, number=1)]

            settlement = await signer.sign_settlement(claims, key.destination_script, Sat(5_000))

            assert await signer.sign_settlement(claims, key.destination_script, Sat(5_000)) == settlement

    raw = settlement.transaction
    for index, claim in enumerate(claims):
        assert interpreter_accepts(claim.terms.funding_script, raw, index, claim.funding_sat)
    for position in range(0, len(raw), 7):
        damaged = raw[:position] + bytes([raw[position] ^ 1]) + raw[position + 1 :]
        assert not all(
            interpreter_accepts(claim.terms.funding_script, damaged, index, claim.funding_sat)
            for index, claim in enumerate(claims)
        ), position


async def test_many_calls_share_one_connection(tmp_path: Path) -> None:
    """Calls at the same time get each their own answer, over one connection."""
    with SignerProcess(tmp_path, f"{REGTEST}[socket]\nmax_connections = 1\n") as running:
        async with client(running.socket) as signer:
            await eventually(signer.health)
            expiries = [UnixTime(EXPIRY + number) for number in range(200)]

            replies = await asyncio.gather(*(signer.public_key(CLIENT_KEY, expiry) for expiry in expiries))

    keys = hardened_keys(bytes.fromhex(running.seed.read_text()))
    assert [reply.server_key for reply in replies] == [keys.public_key(CLIENT_KEY, expiry) for expiry in expiries]


async def eventually(call: Callable[[], Any]) -> Any:
    """Call until the signer is there, as the server does."""
    while True:
        try:
            return await call()
        except SignerAbsent:
            await asyncio.sleep(0.02)


async def test_stopped_signer_is_absent_until_it_goes_on(tmp_path: Path) -> None:
    """While the process is stopped every call ends by its deadline; after SIGCONT the same client is served again."""
    with SignerProcess(tmp_path) as running:
        async with client(running.socket) as patient, client(running.socket, 0.2) as hasty:
            before = await hasty.public_key(CLIENT_KEY, EXPIRY)
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
    """After a stop or a kill calls say that nobody is there; after the next start the same client is served."""
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
    """A connection that the signer has closed meanwhile, by a restart or as idle, costs no call."""
    with SignerProcess(tmp_path, f"{REGTEST}[socket]\nidle_seconds = 0.05\n") as running:
        async with client(running.socket) as signer:
            for _ in range(3):
                await signer.health()
                await asyncio.sleep(0.1)
            running.stop()
            running.start()
            await signer.health()


async def test_refusals_come_with_their_tag(tmp_path: Path) -> None:
    """A policy's refusal is a `SignerRefused` with its tag, and the connection goes on."""
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
    """More claims than a frame holds are refused before anything is sent, which the calls beside it don't notice."""
    claims = [make_claim(REQUEST.claims[0].terms.server_key, change_sat=0, number=n) for n in range(400)]
    async with served(tmp_path, HANDLER) as path, client(path) as signer:
        large = signer.sign_settlement(claims, REQUEST.destination_script, Sat(1))

        results = await asyncio.gather(signer.health(), large, signer.health(), return_exceptions=True)

    assert [type(result) for result in results] == [HealthReply, SignerRefused, HealthReply]


# --- signers that hang or turn away ---------------------------------------------------------------------------------


async def test_policy_deadline_of_a_hanging_key_store(tmp_path: Path) -> None:
    """A key store that hangs ends its own requests by the deadline and holds up no others."""
    release = threading.Event()

    def handle(request: Request) -> Reply:
        if isinstance(request, KeyRequest):
            release.wait(PATIENT)
        return HANDLER(request)

    try:
        async with served(tmp_path, handle, request_seconds=0.2) as path, client(path) as signer:
            hanging = [asyncio.create_task(signer.public_key(CLIENT_KEY, EXPIRY)) for _ in range(WORKERS - 1)]
            await asyncio.sleep(0)

            assert (await signer.health()).network == "regtest"

            for call in hanging:
                with pytest.raises(SignerAbsent, match="not done within"):
                    await call
    finally:
        release.set()


async def test_busy_signer_is_absent(tmp_path: Path) -> None:
    """A signer that has no room for a connection may be asked again later; one that is not for us may not."""
    async with served(tmp_path, HANDLER, max_connections=0) as path, client(path) as signer:
        with pytest.raises(SignerAbsent, match="0 connections are open"):
            await signer.health()


async def test_signer_for_other_users_refuses(tmp_path: Path) -> None:
    """A signer that does not answer our user is a refusal that says so."""
    async with served(tmp_path, HANDLER, allowed_uids=frozenset({4242})) as path, client(path) as signer:
        for _ in range(5):
            with pytest.raises(SignerRefused) as refused:
                await signer.health()
            assert refused.value.tag == "policy-peer"


async def test_bug_in_the_signer_is_a_refusal(tmp_path: Path) -> None:
    """A handler that fails answers the one request with `protocol-internal`, shows nothing of it, and goes on."""

    def handle(request: Request) -> Reply:
        if isinstance(request, KeyRequest):
            raise TypeError(bytes(32).hex())
        return HANDLER(request)

    async with served(tmp_path, handle) as path, client(path) as signer:
        with pytest.raises(SignerRefused) as refused:
            await signer.public_key(CLIENT_KEY, EXPIRY)
        assert str(refused.value) == "protocol-internal: the signer failed"
        await signer.health()


async def test_nobody_there(tmp_path: Path) -> None:
    """Without a socket a call says at once that nobody is there."""
    async with client(tmp_path / "none.sock") as signer:
        with pytest.raises(SignerAbsent, match=r"none\.sock: No such file"):
            await signer.health()


async def test_closing_ends_calls_in_flight(tmp_path: Path) -> None:
    """`close` ends the calls that wait with `SignerAbsent` at once, and no later call connects again."""
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


# --- signers that lie -----------------------------------------------------------------------------------------------


def resigned(
    request: SettlementRequest, alter: Callable[[bytes], bytes] = bytes, keys: Keys = KEYS, **changes: Any
) -> Settlement:
    """A settlement of something else than was asked for, or with other signatures."""

    def server_signature(index: int, digest: bytes) -> bytes:
        terms = request.claims[index].terms
        return alter(keys.sign(terms.client_key, terms.expiry, digest))

    other = {"claims": request.claims, "destination_script": request.destination_script, "fee_sat": request.fee_sat}
    return sign_settlement(**{**other, **changes}, sign=server_signature)


def changed(settlement: Settlement, change: Callable[[CTransaction], CTransaction]) -> Settlement:
    transaction = change(CTransaction.deserialize(settlement.transaction))
    return Settlement(transaction.serialize(), transaction.GetTxid(), settlement.fee_sat)


def with_flag(settlement: Settlement, flag: int) -> Settlement:
    """The settlement whose first server signature says another hash type."""

    def change(transaction: CTransaction) -> CTransaction:
        script = bytearray(transaction.vin[0].scriptSig)
        second = 1 + script[0]
        script[second + script[second]] = flag
        first = CTxIn(transaction.vin[0].prevout, bytes(script), transaction.vin[0].nSequence)
        return CTransaction([first, *transaction.vin[1:]], transaction.vout)

    return changed(settlement, change)


def spliced(settlement: Settlement, other: Settlement) -> Settlement:
    """The one's inputs and outputs with the other's signatures."""
    scripts = [txin.scriptSig for txin in CTransaction.deserialize(other.transaction).vin]

    def change(transaction: CTransaction) -> CTransaction:
        pairs = zip(transaction.vin, scripts, strict=True)
        return CTransaction([CTxIn(i.prevout, script, i.nSequence) for i, script in pairs], transaction.vout)

    return changed(settlement, change)


STRANGER = key_script(PublicKey.from_secret(b"\x07" * 32).format())
HONEST = resigned(REQUEST)
LIES: dict[str, Settlement] = {
    "other destination": resigned(REQUEST, destination_script=STRANGER),
    "other fee paid": mutated(resigned(REQUEST, fee_sat=Sat(6_000)), "fee_sat", REQUEST.fee_sat),
    "other fee said": mutated(HONEST, "fee_sat", 6_000),
    "fewer claims": resigned(REQUEST, claims=REQUEST.claims[:1]),
    "other order": resigned(make_request(KEYS, drained=2), claims=make_request(KEYS, drained=2).claims[::2]),
    "other txid": mutated(HONEST, "txid", bytes(32)),
    "no txid": mutated(HONEST, "txid", b""),
    "trailing byte": mutated(HONEST, "transaction", HONEST.transaction + b"\x00"),
    "cut off": mutated(HONEST, "transaction", HONEST.transaction[:-1]),
    "empty": mutated(HONEST, "transaction", b""),
    "garbage": mutated(HONEST, "transaction", b"\xff" * 300),
    "flag NONE": with_flag(HONEST, 2),
    "flag SINGLE": with_flag(HONEST, 3),
    "flag ALL, anyone can pay": with_flag(HONEST, 0x81),
    "high S": resigned(REQUEST, with_high_s),
    "padded S": resigned(REQUEST, with_padded_s),
    "trailing byte in the signature": resigned(REQUEST, lambda signature: signature + b"\x00"),
    "no DER": resigned(REQUEST, lambda signature: bytes(len(signature))),
    "key of another": resigned(REQUEST, keys=hardened_keys(bytes(31) + b"\x01")),
    "signatures of another settlement": spliced(HONEST, resigned(REQUEST, fee_sat=Sat(6_000))),
    "unsigned": changed(
        HONEST, lambda t: CTransaction([CTxIn(i.prevout, b"", i.nSequence) for i in t.vin], t.vout)
    ),
    "one more output": changed(HONEST, lambda t: CTransaction(t.vin, [*t.vout, CTxOut(1, STRANGER)])),
    "lock time": changed(HONEST, lambda t: CTransaction(t.vin, t.vout, nLockTime=1)),
    "version 2": changed(HONEST, lambda t: CTransaction(t.vin, t.vout, nVersion=2)),
    "sequence": changed(
        HONEST, lambda t: CTransaction([CTxIn(i.prevout, i.scriptSig, 0) for i in t.vin], t.vout)
    ),
}  # fmt: skip


async def test_honest_settlement_is_taken(tmp_path: Path) -> None:
    """What the lies below are made from is what an honest signer returns, and it is taken."""
    async with served(tmp_path, HANDLER) as path, client(path) as signer:
        assert await sign(signer) == HONEST


@pytest.mark.parametrize("lie", LIES)
async def test_settlement_that_was_not_asked_for_is_refused(tmp_path: Path, lie: str) -> None:
    """A settlement that differs in any part from what claims, destination and fee mean is not taken."""
    reply = LIES[lie]
    async with served(tmp_path, lambda request: SettlementReply(request.id, reply)) as path, client(path) as signer:
        with pytest.raises(SignerRefused) as refused:
            await sign(signer)
        assert refused.value.tag == "protocol-reply"


@pytest.mark.parametrize(
    "reply",
    [HEALTH, KeyReply(1, b"\x05" * 33, b""), KeyReply(1, b"\x02" + b"\xff" * 32, b""), SettlementReply(1, HONEST)],
    ids=["health", "prefix", "off-the-curve", "settlement"],
)
async def test_key_that_is_none_is_refused(tmp_path: Path, reply: Reply) -> None:
    """A reply of another kind, or a key that is no compressed point, is not taken as a server key."""
    async with served(tmp_path, lambda _: reply) as path, client(path) as signer:
        with pytest.raises(SignerRefused) as refused:
            await signer.public_key(CLIENT_KEY, EXPIRY)
        assert refused.value.tag == "protocol-reply"


@pytest.mark.parametrize("noise", [b"\xff" * 64, b"HTTP/1.1 200 OK\r\n\r\n", b"\x00\x00\x00\x02\x02\xc0", b"\x00\x00"])
async def test_noise_instead_of_replies_is_absence(tmp_path: Path, noise: bytes) -> None:
    """Whatever else listens at the socket is no signer: the call ends, without waiting for its deadline."""

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
    """A reply under an id that nobody waits for is given to nobody."""

    def handle(request: Request) -> Reply:
        shift = 1_000 if isinstance(request, KeyRequest) else 0
        return HealthReply(request.id + shift, "regtest", "hardened", debug=False)

    async with served(tmp_path, handle) as path, client(path, 0.2) as signer:
        with pytest.raises(SignerAbsent, match="no answer within"):
            await signer.public_key(CLIENT_KEY, EXPIRY)
        assert (await signer.health()).network == "regtest"
