"""Signers that a hostile server attacks: the handler in this process, or a real `paychan-signer` behind its socket."""

from __future__ import annotations

import socket
import time
from pathlib import Path
from typing import Protocol

from paychan.protocol.address import encode_address
from paychan.protocol.types import Network, UnixTime
from paychan.protocol.wire.signer_messages import Reply, Request, decode_reply, encode_frame, frame_size
from signer.judge.facts import Limits
from signer.judge.queries import Identity
from signer.keys.ring import KeyRing
from signer.ledger.leveldb import LevelDbLedger
from signer.secret.sources import Secret
from signer.seed.encryption import DRAWN
from signer.seed.file import Seed, create_seeds
from tests.lib.signer_process import SignerProcess
from tests.signer.judge import Rules
from tests.signer.messages import Answers
from tests.signer.scene import ADDRESS, PREVIOUS, SEEDS

BEGINNING = 1_800_000_500
_PASSPHRASE = b"not a secret in these tests"
_HEAD = b"h"


class Door(Protocol):
    """A signer that answers requests."""

    def now(self) -> int:
        """The signer's time."""

    def wait(self, seconds: int) -> None:
        """Let time pass, if the signer's clock can be set."""

    def beat(self) -> None:
        """Send the operator's heartbeat."""

    def send(self, request: Request) -> Reply:
        """Send a request; called from several threads."""

    def memory(self) -> dict[bytes, bytes]:
        """All entries of the ledger except the head of its log; empty if they can't be read."""

    def restart(self) -> None:
        """End the signer and start it again."""

    def close(self) -> None:
        """End it."""


class Inside:
    """The handler over a ledger on disk, with a clock that the test sets."""

    def __init__(self, directory: Path, keys: KeyRing, rules: Rules) -> None:
        self._directory, self._keys = directory, keys
        self._limits = Limits(
            max_fee_percent=rules.fee_percent,
            max_fee_sat=rules.fee_sat,
            value_per_hour_sat=rules.hour_sat,
            value_per_day_sat=rules.day_sat,
            heartbeat_seconds=rules.heartbeat_seconds,
            value_without_heartbeat_sat=rules.unattended_sat,
            requests_per_second=1_000_000,
            keys_per_second=1_000_000,
        )
        self._now, self._beat_at = BEGINNING, 0
        self._open()

    def _open(self) -> None:
        self._ledger = LevelDbLedger(self._directory / "ledger", self._directory / "audit")
        self._handler = Answers(
            self._keys,
            self._ledger,
            Identity("regtest", "hardened"),
            self._limits,
            heartbeat=lambda: UnixTime(self._beat_at),
            clock=lambda: self._now,
        )

    def now(self) -> int:
        return self._now

    def wait(self, seconds: int) -> None:
        self._now += seconds

    def beat(self) -> None:
        self._beat_at = self._now

    def send(self, request: Request) -> Reply:
        return self._handler(request)

    def memory(self) -> dict[bytes, bytes]:
        ledger = self._ledger
        newest = [ledger._gathering.values, ledger._writing.values]  # before the database, which gets them next
        memory = {**dict(ledger._database), **newest[1], **newest[0]}
        memory.pop(_HEAD, None)
        return memory

    def restart(self) -> None:
        self._ledger.close()
        self._open()

    def close(self) -> None:
        self._ledger.close()


class Outside:
    """A separate process behind its socket; it restarts once, by SIGKILL, because a restart takes long."""

    def __init__(self, directory: Path, address: bytes | None, rules: Rules) -> None:
        text = 'network = "regtest"\n[key]\nmode = "hardened"\n[settlement]\n'
        text += f'previous_addresses = ["{encode_address(PREVIOUS, Network.REGTEST)}"]\n'
        text += f'destination_address = "{encode_address(ADDRESS, Network.REGTEST) if address else ""}"\n'
        text += f"[policy]\nmax_fee_percent = {rules.fee_percent}\nmax_fee_sat = {rules.fee_sat}\n"
        text += f"value_per_hour_sat = {rules.hour_sat}\nvalue_per_day_sat = {rules.day_sat}\n"
        text += "[disk]\nreserve_mb = 0\n"  # the directory may be in memory
        self._process = SignerProcess(directory, text)
        self._process.passphrase.touch(mode=0o600)
        self._process.passphrase.write_bytes(_PASSPHRASE)
        seeds = [Seed("raw", secret, UnixTime(BEGINNING)) for secret in SEEDS]
        create_seeds(self._process.seed, seeds, Secret(bytearray(_PASSPHRASE)), DRAWN)
        self._process.start()
        self._restarts = 1

    def now(self) -> int:
        return int(time.time())

    def wait(self, seconds: int) -> None:
        """Its clock can't be set."""

    def beat(self) -> None:
        """Its heartbeat is off."""

    def send(self, request: Request) -> Reply:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(20)
            connection.connect(str(self._process.socket))
            connection.sendall(encode_frame(request))
            with connection.makefile("rb") as reading:
                return decode_reply(reading.read(frame_size(reading.read(4))))

    def memory(self) -> dict[bytes, bytes]:
        return {}

    def restart(self) -> None:
        if self._restarts:
            self._restarts -= 1
            self._process.kill()
            self._process.start()

    def close(self) -> None:
        self._process.stop()
