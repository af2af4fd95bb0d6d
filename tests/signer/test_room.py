"""Disk space: strangers use none of it, the log is rotated, and settlements have a reserve."""

from __future__ import annotations

import os
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import TypeVar

import pytest

from paychan.protocol.types import UnixTime
from paychan.protocol.wire.signer_messages import (
    Health,
    HealthReply,
    KeyReply,
    KeyRequest,
    NewestRequest,
    Refusal,
    Reply,
    SettlementReply,
    StatusReply,
    StatusRequest,
)
from signer.audit.access import lines
from signer.audit.archive import files, put_aside
from signer.audit.chain import Decision, Entry, Head, verify
from signer.cli.audit import _newest
from signer.judge.facts import Limits
from signer.keys.ring import KeyRing, hardened_keys
from signer.ledger.base import Entry as Put
from signer.ledger.disk import Disk
from signer.ledger.leveldb import LevelDbLedger
from tests.lib.customer import wait_for
from tests.lib.ledger import MemoryLedger, put
from tests.lib.signer_process import REGTEST, SignerProcess
from tests.lib.smalldisk import fill, small_file_system
from tests.signer.messages import CLIENT_KEY, EXPIRY, make_claim, make_handler, make_request, mutated, server_key
from tests.signer.place import call
from tests.signer.talking import HEALTHY, ask, show

_R = TypeVar("_R", bound=Reply)
KEYS = KeyRing([hardened_keys(bytes(32))])
REQUEST = make_request(KEYS)
LINE = Decision(at_ms=1, peer_uid=2, asked="x", about={}, digest="", verdict="signed")


def key_request(number: int, *, settling: bool = False) -> KeyRequest:
    return KeyRequest(1 + number, CLIENT_KEY, UnixTime(EXPIRY + number), settling)


# --- requests of strangers --------------------------------------------------------------------------------------------


def test_fault_62_asking_for_keys_leaves_nothing_on_the_disk(tmp_path: Path) -> None:
    """For any number of key requests, ledger and log get no byte; a count comes with the next decision."""
    ledger = MemoryLedger()
    handler = make_handler(KEYS, REQUEST, ledger=ledger)
    before = list(ledger.decisions)

    assert all(isinstance(handler(key_request(number), 1000), KeyReply) for number in range(300))
    for expiry in (0, 5, 1 << 33):
        assert isinstance(handler(mutated(key_request(0), "expiry", expiry), 1000), Refusal)
    assert (ledger.decisions, ledger.entries) == (before, {})

    handler(REQUEST)
    counts = {(each.asked, each.verdict, each.tag): each.about for each in ledger.decisions[len(before) : -1]}
    assert {kind: about["count"] for kind, about in counts.items()} == {
        ("KeyRequest", "given", ""): 300,
        ("KeyRequest", "refused", "policy-template"): 3,
    }
    assert ledger.decisions[-1].verdict == "signed"


def test_fault_62_the_count_is_written_at_the_end(tmp_path: Path) -> None:
    """A stopped signer has written its counts, and the log is one chain with them."""
    with SignerProcess(tmp_path) as running:
        audit = tmp_path / "signer.audit"
        assert ask(running.socket, Health(1)) == HEALTHY
        for number in range(20):
            assert isinstance(ask(running.socket, key_request(number)), KeyReply)
        assert audit.stat().st_size == 0
        running.stop()

        (entry,) = verify(lines(audit))
        assert (entry.asked, entry.about["count"]) == ("KeyRequest", 20)
        assert "Key 20 times" in call("audit", "show", running.file).output


def test_fault_62_a_flood_of_refusals_and_repeats_is_counted() -> None:
    """Refusals and repeated signatures have lines at a low rate; of a flood the log gets a count."""
    ledger, now = MemoryLedger(), [1_000.0]
    handler = make_handler(KEYS, REQUEST, ledger=ledger, limits=Limits(requests_per_second=1_000), clock=lambda: now[0])
    assert isinstance(handler(REQUEST), SettlementReply)
    wrong = mutated(REQUEST, "fee_sat", 1)
    before = len(ledger.decisions)

    for _ in range(2_000):
        assert isinstance(handler(wrong), Refusal)
        assert isinstance(handler(REQUEST), SettlementReply)
    assert len(ledger.decisions) - before <= 110

    handler.close()
    verdicts = Counter[str]()
    for each in ledger.decisions[before:]:
        verdicts[each.verdict] += each.about.get("count", 1)
    assert verdicts == {"refused": 2_000, "signed": 2_000}


def test_fault_62_every_new_signature_has_a_line_in_any_flood() -> None:
    """A hostile server can't hide a settlement among counted requests."""
    ledger = MemoryLedger()
    handler = make_handler(KEYS, REQUEST, ledger=ledger, limits=Limits(), clock=lambda: 1_000.0)
    for _ in range(500):
        handler(mutated(REQUEST, "destination_script", b"x"))

    for fee_sat in range(5_000, 5_030):
        assert isinstance(handler(mutated(REQUEST, "fee_sat", fee_sat)), SettlementReply)

    fees = [each.about["fee_sat"] for each in ledger.decisions if each.verdict == "signed"]
    assert fees == list(range(5_000, 5_030))


# --- the log's files -------------------------------------------------------------------------------------------------


def rotating(directory: Path) -> LevelDbLedger:
    return LevelDbLedger(directory / "ledger", directory / "signer.audit", audit_file_bytes=2_000)


def chain(directory: Path) -> list[Entry]:
    """All lines of all files, verified as one chain."""
    found, head = list[Entry](), None
    for file in files(directory / "signer.audit"):
        for entry in verify(lines(file), head):
            found.append(entry)
        head = Head(found[-1].n, found[-1].hash)
    return found


def test_fault_62_the_log_continues_in_a_new_file_while_the_signer_runs(tmp_path: Path) -> None:
    """No file is much larger than the setting; all together are one chain, also over a restart, for every command."""
    for _ in range(2):
        with closing(rotating(tmp_path)) as ledger:
            for _ in range(60):
                put(ledger, Put([LINE]))
            head = ledger.head

    found = chain(tmp_path)
    assert (found[0].n, found[-1].n, found[-1].hash) == (1, head.count, head.hash)
    assert sum(each.asked == "x" for each in found) == 120
    sizes = [file.stat().st_size for file in files(tmp_path / "signer.audit")]
    assert len(sizes) > 5
    assert max(sizes) < 2_600
    config = tmp_path / "signer.toml"
    config.write_text(f'network = "regtest"\nstate_dir = "{tmp_path}"\n[key]\nmode = "hardened"\n')
    verified = call("audit", "verify", config, "--head", found[3].hash)
    assert verified.status == 0, verified.output
    assert f"number 1 to {head.count}" in verified.output
    assert [entry.n for entry, _ in _newest(files(tmp_path / "signer.audit"), 100, lambda _: True)] == [
        each.n for each in found[-100:]
    ]
    assert call("audit", "archive", config).status == 0
    assert chain(tmp_path)[-1].n == head.count + 1


@pytest.mark.parametrize("step", ["link", "replace"])
def test_fault_62_a_rotation_that_is_cut_off_breaks_nothing(
    tmp_path: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the process dies before, between or after the steps, the next start continues with one chain."""
    with closing(rotating(tmp_path)) as ledger:
        for _ in range(5):
            put(ledger, Put([LINE]))
        head = ledger.head
    audit = tmp_path / "signer.audit"
    if step == "link":
        audit.with_name(f"signer.audit.1-{head.count}").hardlink_to(audit)
        audit.with_name("signer.audit.new").write_bytes(b"half a li")
    else:
        put_aside(audit, head, 1)

    with closing(rotating(tmp_path)) as ledger:
        put(ledger, Put([LINE]))
        assert ledger.head.count == head.count + (1 if step == "link" else 2)
    assert chain(tmp_path)[-1].n == ledger.head.count


def test_fault_62_a_file_that_can_not_be_put_aside_stays_in_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a file system without hard links, for instance, the log stays one file, and the signer runs on."""

    def refuse(*_: object) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    with closing(rotating(tmp_path)) as ledger:
        for _ in range(30):
            put(ledger, Put([LINE]))

    assert [file.name for file in files(tmp_path / "signer.audit")] == ["signer.audit"]
    assert len(chain(tmp_path)) == 30


# --- the reserve -----------------------------------------------------------------------------------------------------


class Short:
    """A disk without space."""

    shortage = "too little"
    free_bytes = 7


def test_fault_62_below_the_reserve_only_settling_requests_are_answered() -> None:
    """New channels are refused with their own tag, and health reports it; settlements are signed and logged."""
    disk, ledger = Short(), MemoryLedger()
    handler = make_handler(KEYS, REQUEST, ledger=ledger, disk=disk)
    newest = NewestRequest(5, REQUEST.claims)

    for request in (key_request(0), newest):
        refused = handler(request)
        assert isinstance(refused, Refusal)
        assert (refused.tag, refused.reason) == ("protocol-disk", "too little")
    health, status = handler(Health(1)), handler(StatusRequest(2))
    assert isinstance(health, HealthReply)
    assert isinstance(status, StatusReply)
    assert (health.problem, status.problem, status.free_bytes) == ("too little", "too little", 7)
    assert isinstance(handler(key_request(0, settling=True)), KeyReply)
    assert isinstance(handler(REQUEST), SettlementReply)
    assert ledger.decisions[-1].verdict == "signed"

    disk.shortage = ""
    assert isinstance(handler(key_request(0)), KeyReply)


def test_fault_62_a_signer_recovers_from_a_full_disk_by_itself(tmp_path: Path) -> None:
    """Other programs fill the file system up to the reserve: settlements continue, and keys do after space is free."""
    with small_file_system(tmp_path / "small", mib=12) as small:
        signer = SignerProcess(small, REGTEST + "[disk]\nreserve_mb = 4\n")
        signer.log = tmp_path / "log"
        with signer:
            keys = KeyRing([hardened_keys(signer.master)])
            request = make_request(keys)
            show(signer.socket, request)
            fill(small / "filler", leave_bytes=2_000_000)
            refused = until(signer, Refusal)
            assert refused.tag == "protocol-disk"
            health = ask(signer.socket, Health(1))
            assert isinstance(health, HealthReply)
            assert "bytes are free at" in health.problem
            assert isinstance(ask(signer.socket, request), SettlementReply)
            unknown = mutated(request, "claims", (make_claim(server_key(keys), change_sat=0, number=9),))
            show(signer.socket, unknown)
            assert isinstance(ask(signer.socket, unknown), SettlementReply)

            (small / "filler").unlink()
            until(signer, KeyReply)
            assert ask(signer.socket, Health(1)) == HEALTHY


def test_fault_62_without_a_free_byte_the_signer_goes_on_and_starts_again(tmp_path: Path) -> None:
    """Another program takes all: the reserve's file gives each new settlement its space, also after a restart."""
    with small_file_system(tmp_path / "small", mib=24) as small:
        signer = SignerProcess(small, REGTEST + "[disk]\nreserve_mb = 8\n")
        signer.log = tmp_path / "log"
        reserve = small / "signer.ledger.reserve"
        with signer:
            keys = KeyRing([hardened_keys(signer.master)])
            until(signer, KeyReply)
            assert reserve.stat().st_blocks * 512 >= 2_000_000
            fill(small / "filler")
            for number in range(20):
                request = mutated(
                    make_request(keys), "claims", (make_claim(server_key(keys), change_sat=0, number=number),)
                )
                show(signer.socket, request)
                assert isinstance(ask(signer.socket, request), SettlementReply)
                fill(small / f"filler-{number}")
            assert 0 < reserve.stat().st_size < 2_000_000
            signer.stop()
            signer.start()
            assert isinstance(ask(signer.socket, request), SettlementReply)
            for filler in small.glob("filler*"):
                filler.unlink()
            until(signer, KeyReply)
            wait_for(lambda: reserve.stat().st_size == 2_000_000, "the reserve is filled up")


def until(signer: SignerProcess, kind: type[_R]) -> _R:
    """Request a key until the reply is of this kind."""
    for number in range(10_000):
        reply = ask(signer.socket, key_request(number))
        if isinstance(reply, kind):
            return reply
    raise AssertionError(reply)


def test_fault_62_inodes_count_as_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without inodes is short of space as well; so is one that can't be measured."""
    real = os.statvfs(tmp_path)
    assert Disk(tmp_path, 0).shortage == ""
    assert "bytes are free" in Disk(tmp_path, 1 << 62).shortage
    assert "can't be measured" in Disk(tmp_path / "none", 0).shortage

    few = os.statvfs_result((*real[:6], 3, 3, *real[8:10]))
    monkeypatch.setattr(os, "statvfs", lambda _: few)
    assert "3 more files can be created" in Disk(tmp_path, 0).shortage
