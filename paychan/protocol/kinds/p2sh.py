"""The kind of RBPCP: a P2SH output, with signatures over the hash of before segwit (RBPCP §2, §3, §8)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from bitcoin.core.script import CScript, CScriptInvalidError

from paychan.protocol.address import is_script_hash, p2sh_script
from paychan.protocol.errors import Malformed
from paychan.protocol.keys import check_public_key
from paychan.protocol.kinds.base import (
    MAX_SIGNATURE_BYTES,
    SIGHASH_ALL,
    ChannelKind,
    ChannelTerms,
    Claimed,
    PaymentPreimage,
    Spend,
    make_terms,
)
from paychan.protocol.tx import Unlocking, UnsignedTransaction, push
from paychan.protocol.types import OutPoint, Sat

SINGLE_ANYONECANPAY = 0x83
"""Required while the client keeps change: binds input i to output i, and lets the server add inputs and outputs."""
NONE_ANYONECANPAY = 0x82
"""Required when no change is left: the payment has no output."""

_SERVER_BRANCH = b"\x51"  # OP_1 selects the IF branch
_CLIENT_BRANCH = b"\x00"  # OP_0 selects the ELSE branch
_OP_1NEGATE, _OP_1, _OP_16 = 0x4F, 0x51, 0x60

_PUSHES = 4
"""`<client sig> <server sig> <selector> <redeem script>`; the script does not read items below these on the stack."""

_INPUT_BYTES = 36 + 1 + 1 + 1 + MAX_SIGNATURE_BYTES + 1 + 2 + 4
"""An input without the client's signature and the script: outpoint, lengths, server's signature, selector, sequence."""

_CHANGE_TAIL = b"\x00\x00\x00\x00\x83\x00\x00\x00"
_DRAINED_TAIL = b"\x00\x00\x00\x00\x82\x00\x00\x00"
"""Lock time and flag."""


class _P2sh(ChannelKind):
    tag = "p2sh"
    change_flag = SINGLE_ANYONECANPAY
    drained_flag = NONE_ANYONECANPAY
    signs_value = False
    has_witness = False

    def redeem_script(self, terms: ChannelTerms) -> bytes:
        """80 or 81 bytes: `IF <S> CHECKSIGVERIFY ELSE <E> CLTV DROP ENDIF <C> CHECKSIG`."""
        return _redeem_script(terms.server_key, terms.client_key, terms.expiry.lock_time)

    def funding_script(self, terms: ChannelTerms) -> bytes:
        """23 bytes."""
        return p2sh_script(self.redeem_script(terms))

    def is_funding_script(self, script: bytes) -> bool:
        return is_script_hash(script)

    def payment_preimage(
        self, terms: ChannelTerms, outpoint: OutPoint, funding_sat: Sat, change_script: bytes
    ) -> PaymentPreimage:
        """Version 1, one input with its sequence, then one output or none, lock time and flag."""
        del funding_sat
        script = self.redeem_script(terms)
        spent = b"\x01\x00\x00\x00\x01" + outpoint.serialize() + bytes([len(script)]) + script + b"\xff\xff\xff\xff"
        length = bytes([len(change_script)])
        return PaymentPreimage(spent + b"\x01", length + change_script, _CHANGE_TAIL, spent + b"\x00" + _DRAINED_TAIL)

    def may_join(self, claims: Sequence[Claimed]) -> bool:
        """Allow change for input 0 only: the legacy sighash of SINGLE at index i holds i blank outputs before its own.

        Claims without change can be at any index.
        """
        return not any(claim.payment.has_change and claim.terms.kind is self for claim in claims[1:])

    def input(self, claim: Claimed, server_signature: bytes) -> Unlocking:
        """`<client sig> <server sig> OP_1 <redeem script>`."""
        client_signature, script = claim.payment.signature_with_flag, self.redeem_script(claim.terms)
        signed = push(client_signature) + push(server_signature + bytes([SIGHASH_ALL]))
        return signed + _SERVER_BRANCH + push(script), ()

    def input_weight(self, claim: Claimed) -> int:
        signature, script = claim.payment.signature_with_flag, self.redeem_script(claim.terms)
        return 4 * (_INPUT_BYTES + len(signature) + len(script))

    def settlement_digest(
        self, transaction: UnsignedTransaction, index: int, terms: ChannelTerms, funding_sat: Sat
    ) -> bytes:
        del funding_sat
        return transaction.legacy_digest(index, self.redeem_script(terms))

    def recognise(self, unlocking: Unlocking) -> Spend | None:
        try:
            pushes = [(opcode, data) for opcode, data, _ in CScript(unlocking[0]).raw_iter()]
        except CScriptInvalidError:
            return None
        if len(pushes) < 2:
            return None
        stack = [bytes(data or b"") for _, data in pushes]  # a number with its own opcode is read as no bytes
        if not _is_true(*pushes[-2]):
            return Spend(by_server=False, script=stack[-1])
        signatures = stack[-_PUSHES:-2] if len(stack) >= _PUSHES else [b"", b""]
        return Spend(True, stack[-1], *signatures)

    def refund(self, terms: ChannelTerms, client_signature: bytes) -> Unlocking:
        """`<client sig> OP_0 <redeem script>`."""
        signature = client_signature + bytes([SIGHASH_ALL])
        return push(signature) + _CLIENT_BRANCH + push(self.redeem_script(terms)), ()


P2SH = _P2sh()


@lru_cache(1_000)
def _redeem_script(server_key: bytes, client_key: bytes, expiry: int) -> bytes:
    """Build a redeem script; the newest are cached, because judging and signing need the script several times."""
    number = encode_script_number(expiry)
    return b"".join(
        (
            b"\x63\x21",
            server_key,
            b"\xad\x67",
            bytes([len(number)]),
            number,
            b"\xb1\x75\x68\x21",
            client_key,
            b"\xac",
        )
    )


def _is_true(opcode: int, data: bytes | None) -> bool:
    """Read a stack item as a condition (script.cpp: CastToBool)."""
    if data is not None:
        return any(data[:-1]) or bytes(data[-1:]) not in (b"", b"\x00", b"\x80")
    return opcode == _OP_1NEGATE or _OP_1 <= opcode <= _OP_16


def encode_script_number(value: int) -> bytes:
    """Shortest script number of a positive value: little endian, 0x00 appended when the top bit is set."""
    raw = value.to_bytes((value.bit_length() + 7) // 8, "little")
    return raw + b"\x00" if raw[-1] & 0x80 else raw


def parse_redeem_script(script: bytes) -> ChannelTerms:
    """Read a script that has exactly this template; the script rebuilt from its parts must have the same bytes.

    Raises:
        Malformed: any other script, including one whose expiry is not minimally encoded.
        ExpiryNotATime, KeyReuse: see `make_terms`.
    """
    problem = Malformed(field="redeem_script", reason="not the payment channel template")
    if len(script) not in (80, 81) or script[37] != len(script) - 76:
        raise problem
    expiry = int.from_bytes(script[38 : 38 + script[37]], "little")
    terms = make_terms(
        check_public_key(script[2:35], "redeem_script"), check_public_key(script[-34:-1], "redeem_script"), expiry
    )
    if terms.redeem_script != script:
        raise problem
    return terms
