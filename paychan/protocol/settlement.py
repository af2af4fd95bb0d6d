"""Settlement: the transaction that pays the server its share of one channel or of several (RBPCP §8).

Server and signer both build it from the same facts (`Claim`s, destination, fee), so the signer signs only a transaction
that it has built itself. The module `fees` chooses the fee.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeAlias

from bitcoin.core import CTransaction
from bitcoin.core.script import CScript, CScriptInvalidError
from msgspec import Struct

from paychan.protocol.address import encode_address, key_script
from paychan.protocol.errors import PaychanError
from paychan.protocol.kinds.script import ChannelTerms, KeyBytes
from paychan.protocol.kinds.sighash import SIGHASH_ALL
from paychan.protocol.payment import Payment, PaymentVerifier, change_problem
from paychan.protocol.tx import FinalTransaction, double_sha256, varint
from paychan.protocol.types import Network, OutPoint, Sat

MAX_SIGNATURE_BYTES = 72
"""A low-S DER signature of secp256k1 has at most 71 bytes, and one byte of hash flag."""

_LEAST_CHANGE = Sat(1)
"""The caller checks the dust limit; this module only checks that the flag fits the change."""

LEAST_FEE_CAP_SAT = Sat(1_000)
"""A settlement may always pay this fee above one satoshi per byte, whatever share of the received value that is."""

_SERVER_BRANCH = b"\x51"  # OP_1 selects the IF branch
_OP_1NEGATE, _OP_1, _OP_16 = 0x4F, 0x51, 0x60

Sign = Callable[[int, bytes], bytes]
"""`sign(index, digest)` returns the server's strict DER signature for the input at that index."""


class Claim(Struct, frozen=True, array_like=True):
    """One channel's part of a settlement: its funding output and the newest payment from it."""

    terms: ChannelTerms
    outpoint: OutPoint
    funding_sat: Sat
    change_script: bytes
    payment: Payment

    @property
    def received_sat(self) -> Sat:
        """Value that belongs to the server, in satoshi."""
        return Sat(self.funding_sat - self.payment.change_sat)

    def problem(self) -> PaychanError | None:
        """Return why the client did not sign exactly this change value and address, or None.

        Any change above 0 is accepted: the dust limit is checked where a payment arrives.
        """
        verifier = PaymentVerifier(self.terms, self.outpoint, self.funding_sat, self.change_script)
        return change_problem(self.payment, _LEAST_CHANGE) or verifier.problem(self.payment)


class Coin(Struct, frozen=True, array_like=True):
    """An output that pays to the reserve key."""

    outpoint: OutPoint
    value_sat: Sat


class Reserve(Struct, frozen=True, array_like=True):
    """The operator's own coins (P2PKH) that help to pay a settlement's fee; the rest goes back to the same key."""

    public_key: KeyBytes
    coins: tuple[Coin, ...] = ()

    @property
    def funding_script(self) -> bytes:
        """ScriptPubKey of its coins."""
        return key_script(self.public_key)

    def funding_address(self, network: Network) -> str:
        """Address to which the operator sends coins for the reserve."""
        return encode_address(self.funding_script, network)

    @property
    def value_sat(self) -> Sat:
        return Sat(sum(coin.value_sat for coin in self.coins))


class Settlement(Struct, frozen=True, array_like=True):
    """A signed settlement and the fee it pays."""

    transaction: bytes
    txid: bytes
    fee_sat: Sat

    @property
    def size(self) -> int:
        """Size in bytes, which equals virtual bytes: the transaction has no witness."""
        return len(self.transaction)

    def is_dearer_than(self, other: Settlement) -> bool:
        """Say whether it pays a higher fee rate; the fractions are compared exactly."""
        return self.fee_sat * other.size > other.fee_sat * self.size


def leaves_out(new: Settlement, old: Settlement) -> bool:
    """Say whether a settlement lacks inputs of an old one; it replaces the old one when that can't confirm any more."""
    return not set(outpoints_of(old.transaction)) <= set(outpoints_of(new.transaction))


def received_sat(claims: Sequence[Claim]) -> Sat:
    """Sum of the value that belongs to the server, in satoshi."""
    return Sat(sum(claim.received_sat for claim in claims))


def build_settlement(
    claims: Sequence[Claim], destination_script: bytes, fee_sat: Sat, reserve: Reserve | None = None
) -> FinalTransaction:
    """Lay out the unsigned settlement; the value less the fee goes to the destination, without an output if that is 0.

    Raises:
        ValueError: a fee that is negative or exceeds the value of claims and reserve, or a layout that can't be signed.
    """
    available = received_sat(claims) + (reserve.value_sat if reserve else 0)
    if not 0 <= fee_sat <= available or any(claim.received_sat < 0 for claim in claims):
        msg = f"fee of {fee_sat} sat does not fit claims of {available} sat"
        raise ValueError(msg)
    coins = reserve.coins if reserve else ()
    spent = [claim.outpoint for claim in claims] + [coin.outpoint for coin in coins]
    outputs = _outputs(claims, destination_script, Sat(available - fee_sat))
    return FinalTransaction(tuple(spent), outputs, ours=len(coins))


def _outputs(claims: Sequence[Claim], destination_script: bytes, server_sat: Sat) -> tuple[tuple[Sat, bytes], ...]:
    """List the outputs of a settlement: satoshi and scriptPubKey.

    SINGLE ties the client's output to the index of its input, and the legacy sighash of index i holds i blank outputs
    before it. So at most one claim has change: it is input 0, and its change is output 0. Claims without change, and
    the reserve's coins, can be at any index.

    Raises:
        ValueError: a layout that can't be signed.
    """
    if any(change_problem(claim.payment, _LEAST_CHANGE) for claim in claims):
        msg = "a payment's flag does not fit its change"
        raise ValueError(msg)
    if any(claim.payment.has_change for claim in claims[1:]):
        msg = "a claim with change must be input 0"
        raise ValueError(msg)
    first, outputs = claims[0], []
    if first.payment.has_change:
        outputs.append((first.payment.change_sat, first.change_script))
    if server_sat:
        outputs.append((server_sat, destination_script))
    if not outputs:
        msg = "settlement without outputs"
        raise ValueError(msg)
    return tuple(outputs)


class Unsigned:
    """A transaction without the server's signatures, one of which each input needs."""

    __slots__ = ("_fee_sat", "_locks", "_transaction", "digests")

    def __init__(self, transaction: FinalTransaction, locks: Sequence[_Lock], fee_sat: Sat) -> None:
        self._transaction = transaction
        self._locks = locks
        self._fee_sat = fee_sat
        self.digests = [transaction.digest(index, script_code) for index, (script_code, _) in enumerate(locks)]
        """Digests for the SIGHASH_ALL signatures, in the order of the inputs."""

    def signed(self, signatures: Sequence[bytes]) -> Settlement:
        """Put in strict DER signatures of the digests."""
        script_sigs = [
            unlock(signature + bytes([SIGHASH_ALL]))
            for (_, unlock), signature in zip(self._locks, signatures, strict=True)
        ]
        raw = self._transaction.serialize(script_sigs)
        return Settlement(raw, double_sha256(raw), self._fee_sat)

    def signed_by(self, sign: Sign) -> Settlement:
        """Have each digest signed in turn."""
        return self.signed([sign(index, digest) for index, digest in enumerate(self.digests)])


_Lock: TypeAlias = tuple[bytes, Callable[[bytes], bytes]]
"""Script code of an input, and the function that makes its scriptSig of a signature with its flag."""


def prepare_settlement(
    claims: Sequence[Claim], destination_script: bytes, fee_sat: Sat, reserve: Reserve | None = None
) -> Unsigned:
    """Build an unsigned settlement; the inputs after the claims' are the reserve's coins. Raises ValueError."""
    transaction = build_settlement(claims, destination_script, fee_sat, reserve)
    locks: list[_Lock] = [(claim.terms.redeem_script, partial(_script_sig, claim)) for claim in claims]
    if reserve:
        coin = reserve.funding_script, partial(_key_script_sig, reserve.public_key)
        locks += [coin for _ in reserve.coins]
    return Unsigned(transaction, locks, fee_sat)


def sign_settlement(
    claims: Sequence[Claim], destination_script: bytes, fee_sat: Sat, sign: Sign, reserve: Reserve | None = None
) -> Settlement:
    """Build and sign; the indices after the claims' are those of the reserve's coins. Raises ValueError."""
    return prepare_settlement(claims, destination_script, fee_sat, reserve).signed_by(sign)


def settlement_size(
    claims: Sequence[Claim], destination_script: bytes, *, server_output: bool = True, reserve: Reserve | None = None
) -> int:
    """Size in (v)bytes of the signed settlement, if the server's signatures have the largest size."""
    outputs = _outputs(claims, destination_script, Sat(1 if server_output else 0))
    placeholder = bytes(MAX_SIGNATURE_BYTES)
    script_sigs = [len(_script_sig(claim, placeholder)) for claim in claims]
    script_sigs += [len(_key_script_sig(reserve.public_key, placeholder)) for _ in reserve.coins] if reserve else []
    return (
        _FRAME_BYTES
        + len(varint(len(script_sigs)))
        + sum(_INPUT_BYTES + len(varint(size)) + size for size in script_sigs)
        + len(varint(len(outputs)))
        + sum(_VALUE_BYTES + len(varint(len(script))) + len(script) for _, script in outputs)
    )


_FRAME_BYTES = 4 + 4  # version, lock time
_INPUT_BYTES = 36 + 4  # outpoint, sequence
_VALUE_BYTES = 8


CHILD_BYTES = 10 + 41 + 1 + MAX_SIGNATURE_BYTES + 1 + 33 + 34
"""Largest size of a transaction of `sign_child`: frame, input with signature and key, P2PKH output."""


def prepare_child(parent: Settlement, public_key: bytes, fee_sat: Sat) -> Unsigned:
    """Spend the server's output of a settlement back to its script (P2PKH of this key), for a fee that speeds up both.

    Raises:
        ValueError: the settlement has no such output, or the fee is not below the value of the output.
    """
    script = key_script(public_key)
    outputs = list(enumerate(CTransaction.deserialize(parent.transaction).vout))
    ours = [(index, out.nValue) for index, out in outputs if bytes(out.scriptPubKey) == script]
    index, value_sat = ours[-1] if ours else (0, 0)
    if not 0 <= fee_sat < value_sat:
        msg = f"fee of {fee_sat} sat does not fit the server's output of {value_sat} sat"
        raise ValueError(msg)
    child = FinalTransaction((OutPoint(parent.txid, index),), ((Sat(value_sat - fee_sat), script),), ours=1)
    return Unsigned(child, [(script, partial(_key_script_sig, public_key))], fee_sat)


def sign_child(parent: Settlement, public_key: bytes, fee_sat: Sat, sign: Sign) -> Settlement:
    """Build and sign a child, see `prepare_child`."""
    return prepare_child(parent, public_key, fee_sat).signed_by(sign)


def outpoints_of(transaction: bytes) -> list[OutPoint]:
    """List the outpoints that a transaction spends, in order."""
    inputs = CTransaction.deserialize(transaction).vin
    return [OutPoint(bytes(txin.prevout.hash), int(txin.prevout.n)) for txin in inputs]


def base_size(transaction: bytes) -> int:
    """Count bytes without witnesses: at most the virtual bytes (BIP141)."""
    whole = CTransaction.deserialize(transaction)
    return len(CTransaction(whole.vin, whole.vout).serialize())


def without_witness(transaction: bytes) -> bytes:
    """Serialize a transaction without witnesses; its txid is the hash of these bytes (BIP141)."""
    whole = CTransaction.deserialize(transaction)
    return bytes(CTransaction(whole.vin, whole.vout, whole.nLockTime, whole.nVersion).serialize())


def spends_by_server_branch(transaction: bytes, outpoint: OutPoint) -> bool:
    """Say whether a transaction spends a channel's output through the branch that needs the server's signature.

    If it does, it is one of the settlements that the server signed, whatever its txid: others can change the selector
    and the client's signature (threat 18), but not the server's SIGHASH_ALL signature over the outputs. The other
    branch is the client's refund.
    """
    return server_pushes(CTransaction.deserialize(transaction), outpoint) is not None


def server_pushes(transaction: CTransaction, outpoint: OutPoint) -> tuple[int, list[bytes]] | None:
    """Return the index of the input that spends an outpoint by the server's branch, and the pushes of its scriptSig.

    None if no input does. A number that has its own opcode is returned as no bytes.
    """
    for index, txin in enumerate(transaction.vin):
        if (bytes(txin.prevout.hash), int(txin.prevout.n)) == (outpoint.txid, outpoint.vout):
            try:
                pushes = [(opcode, data) for opcode, data, _ in CScript(txin.scriptSig).raw_iter()]
            except CScriptInvalidError:
                return None
            return (index, [bytes(data or b"") for _, data in pushes]) if _selects_server(pushes) else None
    return None


def _selects_server(pushes: Sequence[tuple[int, bytes | None]]) -> bool:
    """Read the stack item below the redeem script as a condition (script.cpp: CastToBool)."""
    if len(pushes) < 2:
        return False
    opcode, data = pushes[-2]
    if data is not None:
        return any(data[:-1]) or bytes(data[-1:]) not in (b"", b"\x00", b"\x80")
    return bool(opcode == _OP_1NEGATE or _OP_1 <= opcode <= _OP_16)


def first_output_sat(transaction: bytes) -> Sat:
    """Value of output 0 in satoshi; in a withdrawal it funds the continued channel."""
    return Sat(CTransaction.deserialize(transaction).vout[0].nValue)


def _script_sig(claim: Claim, server_signature: bytes) -> bytes:
    """`<client sig> <server sig> OP_1 <redeem script>`; the script is longer than 75 bytes, hence OP_PUSHDATA1."""
    client_signature, script = claim.payment.signature_with_flag, claim.terms.redeem_script
    return b"".join(
        (
            bytes([len(client_signature)]),
            client_signature,
            bytes([len(server_signature)]),
            server_signature,
            _SERVER_BRANCH,
            b"\x4c",
            bytes([len(script)]),
            script,
        )
    )


def _key_script_sig(public_key: bytes, signature: bytes) -> bytes:
    """Spend a P2PKH output: `<sig> <key>`."""
    return bytes([len(signature)]) + signature + bytes([len(public_key)]) + public_key
