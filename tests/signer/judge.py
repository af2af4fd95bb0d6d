"""The rules for signatures, from first principles.

Judges the transactions alone, with Bitcoin Core's interpreter and the values of the spent outputs. Shares no code with
the signer, and trusts no request.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fractions import Fraction
from hashlib import sha256
from itertools import permutations
from typing import NamedTuple

from tests.lib.kernel import interpreter_accepts

ALL, SINGLE_ANYONECANPAY, NONE_ANYONECANPAY = 0x01, 0x83, 0x82
LONGEST_SIGNATURE = 72
RELAYED_AND_DUST = 1_000
HOUR, DAY = 3_600, 86_400


class Input(NamedTuple):
    outpoint: bytes
    script_sig: bytes
    sequence: int


class Output(NamedTuple):
    value_sat: int
    script: bytes


class Transaction(NamedTuple):
    txid: bytes
    inputs: list[Input]
    outputs: list[Output]
    lock_time: int


class Reader:
    """Reads a transaction's parts from bytes without witness."""

    def __init__(self, raw: bytes) -> None:
        self.raw, self.at = raw, 0

    def take(self, size: int) -> bytes:
        self.at += size
        assert self.at <= len(self.raw)
        return self.raw[self.at - size : self.at]

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def count(self) -> int:
        first = self.number(1)
        return first if first < 0xFD else self.number({0xFD: 2, 0xFE: 4, 0xFF: 8}[first])


def parse(raw: bytes) -> Transaction:
    """Parse all of it; no bytes may follow."""
    read = Reader(raw)
    read.take(4)
    inputs = [Input(read.take(36), read.take(read.count()), read.number(4)) for _ in range(read.count())]
    outputs = [Output(read.number(8), read.take(read.count())) for _ in range(read.count())]
    lock_time = read.number(4)
    assert read.at == len(raw)
    return Transaction(sha256(sha256(raw).digest()).digest(), inputs, outputs, lock_time)


def pushes(script_sig: bytes) -> list[bytes]:
    """Values that a scriptSig pushes to the stack; OP_1 pushes a 1."""
    read, found = Reader(script_sig), []
    while read.at < len(script_sig):
        opcode = read.number(1)
        if opcode == 0x51:
            found.append(b"\x01")
        else:
            assert 0 < opcode <= 0x4C
            found.append(read.take(opcode if opcode < 0x4C else read.number(1)))
    return found


class Channel(NamedTuple):
    """Facts of one channel: allowed destinations of its settlement, and outputs that an honest payer has signed."""

    destinations: frozenset[bytes]
    promised: frozenset[Output | None] | None
    """Change outputs, None for no change; None instead of the set: the payer colludes and signs anything."""


class Rules(NamedTuple):
    """The operator's limits; 0: no limit."""

    fee_percent: int = 50
    fee_sat: int = 5_000_000
    fee_sat_per_vb: int = 200
    hour_sat: int = 0
    day_sat: int = 0
    heartbeat_seconds: int = 0
    unattended_sat: int = 0


class Settled(NamedTuple):
    """A parsed settlement."""

    txid: bytes
    fee_sat: int
    size: int
    """Its largest possible size: the server's signatures are sometimes a byte shorter."""
    shares: dict[bytes, tuple[int, Output | None]]
    """By each channel's outpoint: the value received, and the change output."""
    spent: frozenset[bytes]
    available_sat: int
    """The value received, and that of the reserve's coins."""

    @property
    def rate(self) -> Fraction:
        return Fraction(self.fee_sat, self.size)

    @property
    def received_sat(self) -> int:
        return sum(received for received, _ in self.shares.values())


class Judge:
    """Checks every transaction that the signer signs, and fails on one that it must not sign."""

    def __init__(
        self, rules: Rules, channels: Mapping[bytes, Channel], reserves: frozenset[bytes], keys: Mapping[bytes, bytes]
    ) -> None:
        """Take channels by funding script, scripts of reserves, and the signer's keys by the script that they open."""
        self.rules = rules
        self.channels = channels
        self.reserves = reserves
        self.keys = keys
        self.outputs: dict[bytes, Output] = {}
        self.shown: set[bytes] = set()
        self.settled: dict[bytes, Settled] = {}
        self.newest: dict[bytes, list[Settled]] = {}
        """Several if they were signed at the same time: one of them is the newest, but it is not known which."""
        self.values: list[tuple[int, int]] = []
        self.beat_at = self.unattended_sat = 0
        self.least: dict[bytes, int] = {}
        """Least value of channels, by the payments that were shown to the signer and not refused."""

    def remember(self, outpoint: bytes, received_sat: int) -> None:
        """Record a payment that was shown to the signer."""
        self.least[outpoint] = max(received_sat, self.least.get(outpoint, 0))

    def learn(self, raw: bytes) -> None:
        """Record a transaction and its outputs, whether it is mined or not."""
        transaction = parse(raw)
        for index, output in enumerate(transaction.outputs):
            self.outputs[transaction.txid + index.to_bytes(4, "little")] = output

    def show(self, raw: bytes, outputs: Iterable[int]) -> None:
        """Record outputs that were shown to the signer: it knows no others."""
        self.shown |= {parse(raw).txid + index.to_bytes(4, "little") for index in outputs}

    def beat(self, now: int) -> None:
        """Record the operator's heartbeat."""
        self.beat_at, self.unattended_sat = now, 0

    def settlements(self, signed: Iterable[tuple[bytes, int]], now: int) -> None:
        """Judge settlements, each with its claimed fee; of concurrent ones, at least one order must be allowed."""
        read = [(self._read(raw), fee_sat) for raw, fee_sat in signed]
        assert all(settled.fee_sat == fee_sat for settled, fee_sat in read)
        new = {settled.txid: settled for settled, _ in read if settled.txid not in self.settled}
        for settled in (self.settled[each.txid] for each, _ in read if each.txid not in new):
            for outpoint in settled.shares:  # signed again: it may have replaced later ones, or been replaced
                self.newest[outpoint] = [*self.newest[outpoint], settled]
        before = self._state()
        for order in permutations(sorted(new.values(), key=lambda each: each.rate)):
            try:
                for settled in order:
                    self._admit(settled, now)
            except AssertionError as error:
                failure = error
                self.settled, self.newest, self.values, self.unattended_sat = before
                before = self._state()
            else:
                for outpoint in {outpoint for settled in order for outpoint in settled.shares}:
                    self.newest[outpoint] = [settled for settled in order if outpoint in settled.shares]
                return
        raise failure

    def _state(self) -> tuple[dict[bytes, Settled], dict[bytes, list[Settled]], list[tuple[int, int]], int]:
        return dict(self.settled), dict(self.newest), list(self.values), self.unattended_sat

    def child(self, raw: bytes, fee_sat: int) -> None:
        """Judge a child: it spends a signed settlement, pays to the same script, and its fee is within the limits."""
        transaction = parse(raw)
        [spent], [left] = transaction.inputs, transaction.outputs
        parent, output = self.settled[spent.outpoint[:32]], self.outputs[spent.outpoint]
        signature, key = pushes(spent.script_sig)
        assert spent.sequence == 0xFFFFFFFD
        assert self.keys[output.script] == key
        assert left.script == output.script
        assert signature[-1] == ALL
        assert interpreter_accepts(output.script, raw, 0, output.value_sat)
        assert output.value_sat - left.value_sat == fee_sat
        self._check_fee(parent, fee_sat, len(raw) + LONGEST_SIGNATURE - len(signature))

    def _read(self, raw: bytes) -> Settled:
        transaction = parse(raw)
        assert transaction.lock_time == 0
        spent = [self.outputs[each.outpoint] for each in transaction.inputs]
        size, shares, allowed = len(raw), dict[bytes, tuple[int, Output | None]](), set(self.reserves)
        for index, (each, output) in enumerate(zip(transaction.inputs, spent, strict=True)):
            assert each.outpoint in self.shown
            assert each.sequence == (0xFFFFFFFD if output.script in self.reserves else 0xFFFFFFFF)
            assert interpreter_accepts(output.script, raw, index, output.value_sat)
            parts = pushes(each.script_sig)
            own = parts[0 if output.script in self.reserves else 1]
            assert own[-1] == ALL
            size += LONGEST_SIGNATURE - len(own)
            if output.script not in self.reserves:
                channel = self.channels[output.script]
                shares[each.outpoint] = _share(channel, output, parts, transaction, index)
                allowed |= channel.destinations
        kept = sum(change is not None for _, change in shares.values())
        assert len({each.outpoint for each in transaction.inputs}) == len(spent)
        assert all(_is_relayed(output.script) for output in transaction.outputs)
        assert kept <= 1  # it is output 0 then: the interpreter has found it at its input's index
        assert len(transaction.outputs) <= kept + 1
        assert all(output.script in allowed for output in transaction.outputs[kept:])
        self.learn(raw)
        fee_sat = sum(each.value_sat for each in spent) - sum(each.value_sat for each in transaction.outputs)
        coins = sum(output.value_sat for output in spent if output.script in self.reserves)
        available = coins + sum(received for received, _ in shares.values())
        return Settled(
            transaction.txid, fee_sat, size, shares, frozenset(each.outpoint for each in transaction.inputs), available
        )

    def _admit(self, settled: Settled, now: int) -> None:
        self._check_fee(settled, 0)
        new_sat = 0
        for outpoint, (received_sat, _) in settled.shares.items():
            assert received_sat >= self.least.get(outpoint, 0)
            earlier = self.newest.get(outpoint, [])
            before_sat = max((before.shares[outpoint][0] for before in earlier), default=0)
            assert received_sat >= before_sat
            assert not earlier or any(settled.rate > each.rate or _breaks_up(settled, each) for each in earlier)
            new_sat += received_sat - before_sat
            self.newest[outpoint] = [settled]
        self.settled[settled.txid] = settled
        self._check_values(new_sat, now)

    def _check_fee(self, settled: Settled, child_sat: int, child_size: int = 0) -> None:
        rules, received_sat = self.rules, settled.received_sat
        rate_sat = (settled.size + child_size) * rules.fee_sat_per_vb
        share_sat = min(received_sat * rules.fee_percent // 100, rules.fee_sat, rate_sat)
        most_sat = min(max(share_sat, settled.size + RELAYED_AND_DUST), received_sat)
        assert min(settled.fee_sat, child_sat) >= 0
        assert settled.fee_sat + child_sat <= most_sat

    def _check_values(self, new_sat: int, now: int) -> None:
        rules = self.rules
        self.values.append((now, new_sat))
        for seconds, most_sat in ((HOUR, rules.hour_sat), (DAY, rules.day_sat)):
            if most_sat and new_sat:
                assert sum(value for at, value in self.values if now - at < seconds) <= most_sat
        if rules.heartbeat_seconds and now - self.beat_at > rules.heartbeat_seconds and new_sat:
            self.unattended_sat += new_sat
            assert self.unattended_sat <= rules.unattended_sat


def _breaks_up(settled: Settled, before: Settled) -> bool:
    """Whether it leaves out an input of the earlier one, and pays its share of the earlier fee, by value or by size."""
    brought = sum(received for outpoint, (received, _) in before.shares.items() if outpoint in settled.shares)
    by_value, by_size = before.fee_sat * brought // before.available_sat, before.fee_sat * settled.size // before.size
    return not before.spent <= settled.spent and settled.fee_sat >= min(by_value, by_size)


def _share(
    channel: Channel, output: Output, parts: list[bytes], transaction: Transaction, index: int
) -> tuple[int, Output | None]:
    """Value and change output of a claim: the payer has signed that output, or the input would be invalid."""
    client, _, branch, _ = parts
    assert branch == b"\x01"
    assert client[-1] in (SINGLE_ANYONECANPAY, NONE_ANYONECANPAY)
    change = transaction.outputs[index] if client[-1] == SINGLE_ANYONECANPAY else None
    assert index == 0 or change is None
    assert channel.promised is None or change in channel.promised
    received_sat = output.value_sat - (change.value_sat if change else 0)
    assert received_sat >= 0
    return received_sat, change


def _is_relayed(script: bytes) -> bool:
    """P2PKH, P2SH, P2WPKH, P2WSH or P2TR."""
    p2pkh = len(script) == 25 and (script[:3], script[23:]) == (b"\x76\xa9\x14", b"\x88\xac")
    p2sh = len(script) == 23 and (script[:2], script[22:]) == (b"\xa9\x14", b"\x87")
    return p2pkh or p2sh or (script[:2], len(script)) in ((b"\0\x14", 22), (b"\0\x20", 34), (b"\x51\x20", 34))
