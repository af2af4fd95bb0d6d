"""A sketch of a second channel kind: P2WSH with the digests of BIP143. A kind is one file like this, and its registration.

The script is that of RBPCP. A payment's digest covers one output of the same index, whatever the index is; so several
claims with change can be settled together, unlike those of RBPCP's kind.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from typing import NamedTuple

from bitcoin.segwit_addr import encode

from paychan.protocol.kinds import base
from paychan.protocol.kinds.base import (
    SIGHASH_ALL,
    ChannelKind,
    ChannelTerms,
    Claimed,
    PaymentPreimage,
    Spend,
    make_terms,
    register,
)
from paychan.protocol.kinds.p2sh import P2SH
from paychan.protocol.tx import FINAL_SEQUENCE, Unlocking, UnsignedTransaction, double_sha256, varint
from paychan.protocol.types import Network, OutPoint, Sat
from tests.lib.channels import Payer

_SINGLE_ANYONECANPAY, _NONE_ANYONECANPAY = 0x83, 0x82
_NO_HASH = bytes(32)
_PREFIXES = {Network.LIVE: "bc", Network.TEST: "tb", Network.REGTEST: "bcrt"}


class _P2wsh(ChannelKind):
    tag = "p2wsh"
    change_flag = _SINGLE_ANYONECANPAY
    drained_flag = _NONE_ANYONECANPAY
    signs_value = True
    has_witness = True

    def redeem_script(self, terms: ChannelTerms) -> bytes:
        return P2SH.redeem_script(terms)

    def funding_script(self, terms: ChannelTerms) -> bytes:
        return b"\x00\x20" + sha256(self.redeem_script(terms)).digest()

    def is_funding_script(self, script: bytes) -> bool:
        return len(script) == 34 and script[:2] == b"\x00\x20"

    def funding_address(self, terms: ChannelTerms, network: Network) -> str:
        return str(encode(_PREFIXES[network], 0, self.funding_script(terms)[2:]))

    def payment_preimage(
        self, terms: ChannelTerms, outpoint: OutPoint, funding_sat: Sat, change_script: bytes
    ) -> PaymentPreimage:
        spent = _Spent(self.redeem_script(terms), outpoint, funding_sat)
        head, tail = _around_outputs(spent, _NO_HASH, _NO_HASH, lock_time=0, flag=_SINGLE_ANYONECANPAY)
        _, tail_of_none = _around_outputs(spent, _NO_HASH, _NO_HASH, lock_time=0, flag=_NONE_ANYONECANPAY)
        script = varint(len(change_script)) + change_script
        return PaymentPreimage(head, script, tail, head + _NO_HASH + tail_of_none, hashes_output=True)

    def may_join(self, claims: Sequence[Claimed]) -> bool:  # noqa: ARG002 - each change is at its claim's index
        return True

    def input(self, claim: Claimed, server_signature: bytes) -> Unlocking:
        server_signature += bytes([SIGHASH_ALL])
        return b"", (claim.payment.signature_with_flag, server_signature, b"\x01", self.redeem_script(claim.terms))

    def settlement_digest(
        self, transaction: UnsignedTransaction, index: int, terms: ChannelTerms, funding_sat: Sat
    ) -> bytes:
        prevouts = b"".join(outpoint.serialize() for outpoint in transaction.inputs)
        sequences = b"".join(each.to_bytes(4, "little") for each in transaction.sequences)
        outputs = b"".join(_output(value, varint(len(script)) + script) for value, script in transaction.outputs)
        spent = _Spent(self.redeem_script(terms), transaction.inputs[index], funding_sat, transaction.sequences[index])
        hashes = map(double_sha256, (prevouts, sequences, outputs))
        return _bip143(spent, *hashes, lock_time=transaction.lock_time, flag=SIGHASH_ALL)

    def recognise(self, unlocking: Unlocking) -> Spend | None:
        script_sig, witness = unlocking
        if script_sig or len(witness) < 3:
            return None
        if not any(witness[-2]):
            return Spend(by_server=False, script=witness[-1])
        signatures = witness[-4:-2] if len(witness) >= 4 else (b"", b"")
        return Spend(True, witness[-1], *signatures)

    def refund(self, terms: ChannelTerms, client_signature: bytes) -> Unlocking:
        return b"", (client_signature + bytes([SIGHASH_ALL]), b"", self.redeem_script(terms))


P2WSH = _P2wsh()


class SegwitPayer(Payer):
    """The client of a channel of this kind."""

    @property
    def terms(self) -> ChannelTerms:
        server_key, client_key = self.server_key.public_key.format(), self.key.public_key.format()
        return make_terms(server_key, client_key, self.expiry, tag=P2WSH.tag)


@contextmanager
def registered() -> Iterator[None]:
    """Register the kind for a while."""
    register(P2WSH)
    try:
        yield
    finally:
        forget()


def forget() -> None:
    """Take the registration back, if there is one."""
    base._KINDS.pop(P2WSH.tag, None)


class _Spent(NamedTuple):
    script: bytes
    outpoint: OutPoint
    value_sat: Sat
    sequence: int = FINAL_SEQUENCE


def _bip143(spent: _Spent, prevouts: bytes, sequences: bytes, outputs: bytes, *, lock_time: int, flag: int) -> bytes:
    """Digest of BIP143, version 1."""
    head, tail = _around_outputs(spent, prevouts, sequences, lock_time=lock_time, flag=flag)
    return double_sha256(head + outputs + tail)


def _around_outputs(
    spent: _Spent, prevouts: bytes, sequences: bytes, *, lock_time: int, flag: int
) -> tuple[bytes, bytes]:
    """The bytes before and after hashOutputs."""
    head = (
        b"\x01\x00\x00\x00",
        prevouts,
        sequences,
        spent.outpoint.serialize(),
        varint(len(spent.script)) + spent.script,
        spent.value_sat.to_bytes(8, "little"),
        spent.sequence.to_bytes(4, "little"),
    )
    return b"".join(head), lock_time.to_bytes(4, "little") + flag.to_bytes(4, "little")


def _output(value_sat: int, script: bytes) -> bytes:
    return value_sat.to_bytes(8, "little") + script
