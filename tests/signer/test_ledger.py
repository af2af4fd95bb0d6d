"""The ledger keeps what was signed: over restarts, kills, full disks and damage."""

from __future__ import annotations

import asyncio
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import plyvel
import pytest

from paychan.protocol.settlement import Settlement
from paychan.protocol.types import OutPoint, Sat
from paychan.protocol.wire.signer_messages import (
    FundingReply,
    Health,
    Refusal,
    SettlementReply,
    SettlementRequest,
    encode_frame,
)
from signer.audit.chain import BEGINNING, Decision, encode_lines
from signer.judge.handler import Handler
from signer.keys.ring import KeyRing, hardened_keys
from signer.ledger import opening
from signer.ledger.base import Entry, LedgerFailed
from signer.ledger.entries import (
    VERSION,
    DamagedEntry,
    Entries,
    Flow,
    Output,
    Signed,
    decode_entry,
    encode_entry,
    entries_of,
)
from signer.ledger.leveldb import Group, LevelDbLedger
from signer.vital import EXIT_BROKEN
from tests.lib import background
from tests.lib.ledger import MemoryLedger, put_together
from tests.lib.ledger import put as write
from tests.lib.looped import looped
from tests.lib.signer_process import COMMAND, REGTEST, SignerProcess
from tests.signer.messages import (
    make_child_request,
    make_claim,
    make_fundings,
    make_handler,
    make_request,
    mutated,
    server_key,
)
from tests.signer.talking import HEALTHY
from tests.signer.test_service import ask

KEYS = KeyRing([hardened_keys(bytes(32))])
REQUEST = make_request(KEYS, drained=2)
DEARER = mutated(REQUEST, "fee_sat", 6_000)
DECISION = Decision(at_ms=1, peer_uid=2, asked="x", about={}, digest="", verdict="signed")
ROOT = Path(__file__).parents[2]
FIRST, SECOND, THIRD = (claim.outpoint for claim in REQUEST.claims)
ENTRY = Signed(bytes(range(32)), Sat(5_000), 300, Sat(400_000), b"\x76\xa9", Sat(1_000_000))
SECOND_VERSION = "0296c420" + bytes(range(32)).hex() + "cd1388cd012cce00061a80c40276a9ce000f4240"
THIRD_VERSION = "03" + SECOND_VERSION[2:]
FROZEN_ENTRY = "04" + SECOND_VERSION[2:]
FIRST_VERSION = "0195c420" + bytes(range(32)).hex() + "cd1388cd012cce00061a80c40276a9"


def handler(ledger: Any) -> Handler:
    return make_handler(KEYS, REQUEST, ledger=ledger)


def show(path: Path, request: SettlementRequest) -> None:
    """Show the outputs that a request spends, as a server does."""
    for funding in make_fundings(request):
        assert isinstance(ask(path, funding), FundingReply)


def opened_at(path: Path) -> LevelDbLedger:
    return LevelDbLedger(path, path.with_name("audit"))


def put(ledger: Any, signed: Entries) -> None:
    """Record these entries, and wait until they are on disk."""
    write(ledger, Entry(signed=signed))


# --- the contract ---------------------------------------------------------------------------------------------------


@pytest.fixture(params=["memory", "leveldb"])
def ledger(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    if request.param == "memory":
        yield MemoryLedger()
    else:
        with closing(opened_at(tmp_path / "ledger")) as opened:
            yield opened


def test_entries_are_read_back(ledger: Any) -> None:
    """For the requested outpoints, the last written entries are returned."""
    outpoints = [FIRST, SECOND, OutPoint(bytes(32), 0), OutPoint(FIRST.txid, FIRST.vout + 1)]
    assert ledger.read(outpoints) == {}
    put(ledger, {FIRST: ENTRY, SECOND: ENTRY})
    put(ledger, {FIRST: mutated(ENTRY, "fee_sat", 6_000)})

    assert ledger.read(outpoints) == {FIRST: mutated(ENTRY, "fee_sat", 6_000), SECOND: ENTRY}
    assert ledger.read([]) == {}


def test_a_put_entry_is_read_before_it_is_on_disk(ledger: Any) -> None:
    """A read after a put returns the entry, written or not; the last of several counts."""

    async def put_all() -> None:
        waiting = [ledger.put(Entry(signed={FIRST: mutated(ENTRY, "fee_sat", number)})) for number in range(200)]
        assert ledger.read([FIRST])[FIRST].fee_sat == 199
        for each in waiting:
            await each

    background.run(put_all)
    assert ledger.read([FIRST])[FIRST].fee_sat == 199


def test_all_kinds_of_entries_are_kept(ledger: Any) -> None:
    """Outputs, requests, settlements, sums and decisions are found, each by its key."""
    output, flow, digest = Output(Sat(7), b"\x76\xa9"), Flow(((3, 5),), 9), bytes(32)
    settlement = Settlement(b"\x01", b"\x02" * 32, Sat(3))
    decision = Decision(at_ms=1, peer_uid=2, asked="x", about={}, digest="", verdict="signed")
    write(ledger, Entry([decision], {}, REQUEST, digest, {FIRST: output}, flow=flow))
    ledger.keep(digest, settlement)

    assert (ledger.outputs([FIRST, SECOND]), ledger.shown) == ({FIRST: output}, 1)
    assert (ledger.request(digest), ledger.request(bytes(31))) == (REQUEST, None)
    assert (ledger.settlement(digest), ledger.settlement(bytes(31))) == (settlement, None)
    assert (ledger.flow, ledger.head.count) == (flow, 1)
    assert ledger.read([FIRST]) == {}


def test_handler_enters_what_it_signs(ledger: Any) -> None:
    """After a settlement each of its claims has an entry, and a refusal changes none."""
    signs = handler(ledger)
    assert isinstance(signs(REQUEST), SettlementReply)
    remembered = ledger.read([FIRST, SECOND, THIRD])

    assert isinstance(signs(mutated(REQUEST, "fee_sat", 4_999)), Refusal)
    assert ledger.read([FIRST, SECOND, THIRD]) == remembered == entries_of(REQUEST)


# --- an entry -------------------------------------------------------------------------------------------------------


def test_bytes_of_entries_never_change() -> None:
    """An entry has the same bytes as in every release of this version; only the checksum is not compared."""
    assert encode_entry(ENTRY)[:-4].hex() == FROZEN_ENTRY
    assert decode_entry(encode_entry(ENTRY), Signed) == ENTRY


@looped(
    ("written", "funding_sat"),
    [(FIRST_VERSION, 0), (SECOND_VERSION, ENTRY.funding_sat), (THIRD_VERSION, ENTRY.funding_sat)],
)
def test_entries_of_earlier_versions_are_read(written: str, funding_sat: int) -> None:
    """Entries of an earlier release are read; those of the first one lack the funding value."""
    content = bytes.fromhex(written)

    read = decode_entry(content + zlib.crc32(content).to_bytes(4, "big"), Signed)
    assert read == mutated(ENTRY, "funding_sat", funding_sat)


def test_sums_of_earlier_versions_are_read() -> None:
    """Recently settled sums of an earlier release still count, as sums of aged channels."""
    content = bytes.fromhex("02929192030509")

    assert decode_entry(content + zlib.crc32(content).to_bytes(4, "big"), Flow) == Flow(((3, 5),), 9, ())


def test_every_damage_is_found() -> None:
    """A truncated entry, one with a flipped bit, and other bytes are reported as damaged."""
    raw = encode_entry(ENTRY)
    damaged = [raw[:size] for size in range(len(raw))]
    damaged += [raw[:i] + bytes([raw[i] ^ 1 << bit]) + raw[i + 1 :] for i in range(len(raw)) for bit in range(8)]
    damaged += [encode_entry(mutated(ENTRY, "size", 0)), encode_entry(mutated(ENTRY, "fee_sat", -1)), raw + b"\x00"]
    damaged += [encode_entry(mutated(ENTRY, "digest", "text")), encode_entry((*range(7),))]  # type: ignore[arg-type]

    for content in damaged:
        with pytest.raises(DamagedEntry):
            decode_entry(content, Signed)
    with pytest.raises(DamagedEntry, match=f"has version 9, want {VERSION}"):
        decode_entry(b"\x09" + raw[1:], Signed)


def test_damaged_entry_stops_only_its_outpoint(tmp_path: Path) -> None:
    """An outpoint with a damaged entry is never signed for and the entry never overwritten; others are served."""
    path = tmp_path / "ledger"
    with closing(opened_at(path)) as opened:
        assert isinstance(handler(opened)(REQUEST), SettlementReply)
    with closing(plyvel.DB(str(path))) as database:
        raw = bytearray(database.get(SECOND.serialize()))
        raw[10] ^= 1
        database.put(SECOND.serialize(), bytes(raw), sync=True)

    with closing(opened_at(path)) as opened:
        signs = handler(opened)
        for request in (REQUEST, mutated(REQUEST, "fee_sat", 1_000_000), make_child_request(REQUEST)):
            reply = signs(request)
            assert isinstance(reply, Refusal)
            assert (reply.tag, reply.need_sat) == ("policy-watermark", 0)
            assert f"the ledger's entry of {SECOND} can't be read: entry checksum" in reply.reason
        assert opened.read([FIRST]) == {FIRST: entries_of(REQUEST)[FIRST]}
        rest = mutated(REQUEST, "claims", (REQUEST.claims[0], REQUEST.claims[2]))
        assert isinstance(signs(mutated(rest, "fee_sat", 9_000)), SettlementReply)
    with closing(plyvel.DB(str(path))) as database:
        assert database.get(SECOND.serialize()) == raw


# --- the directory --------------------------------------------------------------------------------------------------


def test_concurrent_entries_share_a_write(tmp_path: Path) -> None:
    """Concurrent puts wait for few syncs, and each entry is on disk afterwards."""
    with closing(opened_at(tmp_path / "ledger")) as opened:
        entries = {OutPoint(bytes(32), number): mutated(ENTRY, "fee_sat", number) for number in range(100)}
        groups = put_together(opened, [Entry([DECISION], {outpoint: entry}) for outpoint, entry in entries.items()])

        assert len(set(groups)) < 50
        assert opened.read(entries) == entries
        assert opened.head.count == 100


async def test_a_cancelled_caller_disturbs_no_other(tmp_path: Path) -> None:
    """Of callers that wait for one write, one is cancelled: the others continue when it is on disk."""

    async def wait(entry: Entry) -> None:
        await opened.put(entry)

    with closing(opened_at(tmp_path / "ledger")) as opened:
        waiting = [asyncio.create_task(wait(Entry())) for _ in range(3)]
        await asyncio.sleep(0)
        waiting[1].cancel()
        ended = await asyncio.gather(*waiting, return_exceptions=True)

    assert [type(each) for each in ended] == [type(None), asyncio.CancelledError, type(None)]


def test_a_kept_settlement_is_written_without_a_put(tmp_path: Path) -> None:
    """A settlement that was returned survives the process, even without a later request."""
    with closing(opened_at(tmp_path / "ledger")) as opened:
        opened.keep(bytes(32), Settlement(b"\x01", b"\x02" * 32, Sat(3)))

        deadline = time.monotonic() + 10
        while opened._database.get(b"t" + bytes(32)) is None:
            assert time.monotonic() < deadline
            time.sleep(0.001)


def test_ledger_survives_a_restart(tmp_path: Path) -> None:
    """After a stop or a kill the process knows its signatures: it repeats them, and signs nothing cheaper; children too."""
    with SignerProcess(tmp_path) as running:
        keys = KeyRing([hardened_keys(running.master)])
        request = make_request(keys)
        show(running.socket, request)
        signed = ask(running.socket, request)
        assert isinstance(signed, SettlementReply)
        child = ask(running.socket, make_child_request(request))
        for end in (running.stop, running.kill):
            end()
            running.start()

            cheaper = ask(running.socket, mutated(request, "fee_sat", 4_000))
            assert isinstance(cheaper, Refusal)
            assert (cheaper.tag, cheaper.need_sat) == ("policy-replacement", 5_001)
            assert ask(running.socket, request) == signed
            assert ask(running.socket, make_child_request(request)) == child


def test_deleted_ledger_is_created_again(tmp_path: Path) -> None:
    """Without the directory the signer starts and signs; only its record of earlier settlements is lost."""
    with SignerProcess(tmp_path) as running:
        request = make_request(KeyRing([hardened_keys(running.master)]))
        show(running.socket, request)
        assert isinstance(ask(running.socket, request), SettlementReply)
        running.stop()
        for file in (tmp_path / "signer.ledger").iterdir():
            file.unlink()
        (tmp_path / "signer.ledger").rmdir()
        running.start()
        unshown = ask(running.socket, request)
        assert isinstance(unshown, Refusal)
        assert unshown.tag == "protocol-funding"
        show(running.socket, request)

        refused = ask(running.socket, make_child_request(request))
        assert isinstance(refused, Refusal)
        assert refused.tag == "policy-template"
        assert isinstance(ask(running.socket, mutated(request, "fee_sat", 4_000)), SettlementReply)


def test_second_signer_on_one_state_directory_is_refused(tmp_path: Path) -> None:
    """A second signer, even with another socket, ends with one line and the remedy; the first continues."""
    with SignerProcess(tmp_path) as running:
        file = tmp_path / "second.toml"
        file.write_text(f'state_dir = "{tmp_path}"\n{REGTEST}[socket]\npath = "{tmp_path}/second.sock"\n')

        ended = subprocess.run([COMMAND, file], capture_output=True, text=True, check=False, timeout=30)

        assert ended.returncode == 2
        assert f"paychan-signer: {file}: state_dir: {tmp_path}/signer.ledger is in use by process" in ended.stderr
        assert "Traceback" not in ended.stderr
        assert not (tmp_path / "second.sock").exists()
        assert ask(running.socket, Health(1)) == HEALTHY


@pytest.mark.parametrize("damage", ["log", "current", "no-current", "a-file"])
def test_damaged_directory_is_not_replaced(tmp_path: Path, damage: str) -> None:
    """A directory that can't be opened is left as it is, with an error that names the remedy."""
    path = tmp_path / "ledger"
    with closing(opened_at(path)) as opened:
        for number in range(300):
            put(opened, {OutPoint(bytes(32), number): ENTRY})
    log = max(path.glob("*.log"), key=lambda file: file.stat().st_size)
    if damage == "log":
        log.write_bytes(log.read_bytes()[:5_000] + b"\xff" * 50 + log.read_bytes()[5_050:])
    elif damage == "current":
        (path / "CURRENT").write_text("MANIFEST-000099\n")
    elif damage == "no-current":
        (path / "CURRENT").unlink()
    else:
        path.rename(tmp_path / "away")
        path.write_text("something")
    before = {file.name: file.read_bytes() for file in path.glob("*") if file.suffix in (".log", ".ldb")}

    with pytest.raises(LedgerFailed, match=r"move it away to start a new ledger|can't be opened"):
        opened_at(path)

    assert {name: (path / name).read_bytes() for name in before} == before


def test_directory_is_private(tmp_path: Path) -> None:
    """Other users can't read the ledger, which lists the channels."""
    with closing(opened_at(tmp_path / "state" / "ledger")):
        assert (tmp_path / "state" / "ledger").stat().st_mode & 0o777 == 0o700


def test_closed_ledger_fails(tmp_path: Path) -> None:
    """A request in progress when the signer stops gets no signature, and causes no crash."""
    opened = opened_at(tmp_path / "ledger")
    opened.close()
    opened.close()

    reply = make_handler(KEYS, ledger=opened)(REQUEST)

    assert isinstance(reply, Refusal)
    assert reply.tag == "protocol-ledger"


# --- between write and reply ----------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from pathlib import Path
from types import SimpleNamespace
from paychan.protocol.wire.signer_messages import decode_request
from signer.ledger.leveldb import LevelDbLedger
from tests.signer.test_ledger import KEYS, REQUEST, handler

path = Path(sys.argv[1])
ledger, moment = LevelDbLedger(path, path.with_name("audit")), sys.argv[2]
signs, request = handler(ledger), decode_request(bytes.fromhex(sys.argv[3]))
kill = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
if moment == "before the write":
    ledger._audit.append = kill
if moment == "after the log":
    ledger._database = SimpleNamespace(get=ledger._database.get, write_batch=kill)
if moment == "after the write":
    signs._signed = kill
signs(request)
kill()
"""


def kill_while_signing(path: Path, moment: str, request: SettlementRequest) -> None:
    command = [sys.executable, "-c", KILLED, str(path), moment, encode_frame(request)[4:].hex()]
    assert subprocess.run(command, check=False, timeout=30, cwd=ROOT).returncode == -9


@pytest.mark.parametrize("moment", ["after the write", "after signing"])
@pytest.mark.parametrize("earlier", [False, True])
def test_killed_between_write_and_answer(tmp_path: Path, moment: str, earlier: bool) -> None:
    """A written request counts as signed although no reply was sent: it is signed again, a cheaper one is refused."""
    path = tmp_path / "ledger"
    if earlier:
        with closing(opened_at(path)) as opened:
            assert isinstance(handler(opened)(REQUEST), SettlementReply)

    kill_while_signing(path, moment, DEARER)

    with closing(opened_at(path)) as opened:
        assert opened.read([FIRST, SECOND, THIRD]) == entries_of(DEARER)
        cheaper = handler(opened)(mutated(REQUEST, "fee_sat", 5_999))
        assert isinstance(cheaper, Refusal)
        assert (cheaper.tag, cheaper.need_sat) == ("policy-replacement", 6_001)
        assert handler(opened)(DEARER) == handler(MemoryLedger())(DEARER)


SIGN = """
import sys
from pathlib import Path
from paychan.protocol.wire.signer_messages import decode_request
from tests.signer.test_ledger import handler, opened_at

ledger = opened_at(Path(sys.argv[1]))
signs = handler(ledger)
for request in sys.argv[2:]:
    reply = signs(decode_request(bytes.fromhex(request)))
    print(type(reply).__name__, getattr(reply, "tag", ""))
ledger.close()
"""


def sign_under_strace(tmp_path: Path, *requests: SettlementRequest, fail: int = 0) -> tuple[list[str], int]:
    """Open a separate ledger and sign; return replies and number of syncs. The sync number `fail` fails."""
    with tempfile.TemporaryDirectory(dir=tmp_path) as name:
        options = ["-f", "-qq", "-o", f"{name}/trace", "-e", "trace=fdatasync"]
        options += ["-e", f"inject=fdatasync:error=EIO:when={fail}"] if fail else []
        asked = [encode_frame(request)[4:].hex() for request in requests]
        command = ["strace", *options, sys.executable, "-c", SIGN, f"{name}/ledger", *asked]
        ended = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, cwd=ROOT)
        return ended.stdout.splitlines(), Path(name, "trace").read_text().count("fdatasync(")


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace (tests/system-packages)")
def test_synced_before_each_signature(tmp_path: Path) -> None:
    """A signature takes two syncs, of log and ledger; after a failed sync nothing more is signed."""
    _, opening = sign_under_strace(tmp_path)

    assert sign_under_strace(tmp_path, REQUEST, REQUEST) == (["SettlementReply "] * 2, opening + 4)
    assert sign_under_strace(tmp_path, REQUEST, DEARER) == (["SettlementReply "] * 2, opening + 4)
    shown = 2 * len(make_fundings(REQUEST))  # strace counts by thread, and one thread makes all of these
    for which in (3, 4):
        replies, _ = sign_under_strace(tmp_path, REQUEST, DEARER, REQUEST, fail=shown + which)
        assert replies == ["SettlementReply ", "Refusal protocol-ledger", "Refusal protocol-ledger"]


@pytest.mark.parametrize("moment", ["before the write", "after the log"])
def test_killed_before_the_write(tmp_path: Path, moment: str) -> None:
    """A request that was not written was not signed: any other may follow. An extra line in the log does no harm."""
    path = tmp_path / "ledger"
    kill_while_signing(path, moment, DEARER)

    with closing(opened_at(path)) as opened:
        assert opened.read([FIRST, SECOND, THIRD]) == {}
        assert isinstance(handler(opened)(REQUEST), SettlementReply)


def test_log_without_its_end_stops_the_start(tmp_path: Path) -> None:
    """Removed last lines of the log, or another log in its place, are noticed at the next start."""
    path, log = tmp_path / "ledger", tmp_path / "audit"
    with closing(opened_at(path)) as opened:
        assert isinstance(handler(opened)(REQUEST), SettlementReply)
    lines = log.read_bytes().splitlines(keepends=True)
    for content in (b"".join(lines[:-1]), b"", encode_lines([DECISION] * len(lines), BEGINNING)[0]):
        log.write_bytes(content)
        with pytest.raises(
            LedgerFailed, match=rf"does not hold line {len(lines)}, which was written: restore the file"
        ):
            opened_at(path)
    log.write_bytes(b"".join(lines))
    opened_at(path).close()


def test_fault_63_failed_write_ends_the_signer(tmp_path: Path) -> None:
    """A failed write gives no signature and ends the process with status 3; the next start has all earlier entries."""
    with SignerProcess(tmp_path) as running:
        keys = KeyRing([hardened_keys(running.master)])
        large, small = make_request(keys, drained=190), make_request(keys, drained=1)
        known = mutated(small, "claims", (make_claim(server_key(keys), change_sat=0, number=500),))
        for request in (large, known):
            show(running.socket, request)
        assert isinstance(ask(running.socket, known), SettlementReply)
        _, hard = resource.prlimit(running.pid, resource.RLIMIT_FSIZE)
        size = max(file.stat().st_size for file in (tmp_path / "signer.ledger").glob("*.log"))
        resource.prlimit(running.pid, resource.RLIMIT_FSIZE, (size + 1_000, hard))

        with suppress(ConnectionError):
            assert ask(running.socket, large) is None
        assert running.process is not None
        assert running.process.wait(20) == EXIT_BROKEN
        assert "start the signer again" in running.log.read_text()
        running.start()
        cheaper = ask(running.socket, mutated(known, "fee_sat", 1))
        assert isinstance(cheaper, Refusal)
        assert cheaper.tag == "policy-replacement"
        assert isinstance(ask(running.socket, small), SettlementReply)


def test_fault_32_a_torn_tail_of_the_ledger_does_not_stop_the_signer(tmp_path: Path) -> None:
    """An unfinished write of a power cut is cut off and kept in a file; earlier entries are still read."""
    path = tmp_path / "signer.ledger"
    with closing(LevelDbLedger(path, tmp_path / "signer.audit")):
        pass
    log, tail = max(path.glob("[0-9]*.log")), b"\x01\x02\x03\x04\x0a\x00\x77" + b"\x55" * 400
    whole = log.read_bytes()
    log.write_bytes(whole + tail)

    with closing(LevelDbLedger(path, tmp_path / "signer.audit")):
        pass

    assert [kept.read_bytes() for kept in tmp_path.glob("signer.ledger.torn-*")] == [tail]


def test_fault_80_a_lock_of_another_user_is_not_in_use(tmp_path: Path) -> None:
    """A LOCK that can't be opened is reported as such, not as another running signer."""
    error = plyvel.IOError(f"IO error: {tmp_path}/LOCK: Permission denied".encode())

    assert "can't be opened" in opening.why_not_opened(tmp_path, error)


def test_the_log_of_an_idle_ledger_stays_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Test writes count for LevelDB as values, so that it begins a new log at times; empty batches would not."""
    monkeypatch.setitem(opening.OPTIONS, "write_buffer_size", 65_536)
    with closing(LevelDbLedger(tmp_path / "signer.ledger", tmp_path / "signer.audit")) as ledger:
        for _ in range(20_000):
            ledger._write(Group())
        largest = max(file.stat().st_size for file in (tmp_path / "signer.ledger").glob("*.log"))

    assert largest < 2 * 65_536
