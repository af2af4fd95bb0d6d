"""Settlement: the transaction that pays the server its share of one channel or of several (RBPCP §8).

Server and signer both build it from the same facts (`Claim`s, destination, fee), so the signer signs only a transaction
that it has built itself. The module `fees` chooses the fee.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeAlias

from bitcoin.core import CTransaction
from msgspec import Struct

from paychan.protocol.address import encode_address, key_script
from paychan.protocol.errors import PaychanError
from paychan.protocol.keys import KeyBytes
from paychan.protocol.kinds.base import (
    MAX_SIGNATURE_BYTES,
    ChannelTerms,
    Spend,
    recognise,
)
from paychan.protocol.kinds.p2pkh import key_digest, key_input, key_input_weight
from paychan.protocol.payment import Payment, PaymentVerifier, change_problem
from paychan.protocol.tx import (
    FINAL_SEQUENCE,
    SIGNALLING_SEQUENCE,
    Unlocking,
    UnsignedTransaction,
    size_of,
    unlockings_of,
    virtual_size,
)
from paychan.protocol.types import Network, OutPoint, Sat

_LEAST_CHANGE = Sat(1)
"""The caller checks the dust limit; this module only checks that the flag fits the change."""

LEAST_FEE_CAP_SAT = Sat(1_000)
"""A settlement may always pay this fee above one satoshi per byte, whatever share of the received value that is."""

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
        return verifier.problem(self.payment)


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


def layout_problem(claims: Sequence[Claim]) -> str | None:
    """Return why these claims can't be settled together in this order, or None.

    Claim i is input i, and its change is output i. Each kind says at which places its claims are valid.
    """
    changes = [claim.payment.change_sat for claim in claims]
    if any(changes[len(changes) - changes.count(Sat(0)) :]):
        return "claims with change must come first"
    if not all(kind.may_join(claims) for kind in {claim.terms.kind for claim in claims}):
        return "a claim leaves change at a place where its payment is not valid"
    return None


class Settlement(Struct, frozen=True, array_like=True):
    """A signed settlement and the fee it pays."""

    transaction: bytes
    txid: bytes
    fee_sat: Sat

    @property
    def size(self) -> int:
        """Size in virtual bytes."""
        return virtual_size(self.transaction)

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
) -> UnsignedTransaction:
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
    sequences = [FINAL_SEQUENCE] * len(claims) + [SIGNALLING_SEQUENCE] * len(coins)
    return UnsignedTransaction(spent, outputs, sequences)


def _outputs(claims: Sequence[Claim], destination_script: bytes, server_sat: Sat) -> tuple[tuple[Sat, bytes], ...]:
    """List the outputs of a settlement: satoshi and scriptPubKey.

    The claims with change come first, because a payment ties the client's output to the index of its input. The reserve's
    coins can be at any index.

    Raises:
        ValueError: a layout that can't be signed.
    """
    if any(change_problem(claim.payment, claim.terms.kind, _LEAST_CHANGE) for claim in claims):
        msg = "a payment's flag does not fit its change"
        raise ValueError(msg)
    problem = layout_problem(claims)
    if problem is not None:
        raise ValueError(problem)
    outputs = [(claim.payment.change_sat, claim.change_script) for claim in claims if claim.payment.change_sat]
    if server_sat:
        outputs.append((server_sat, destination_script))
    if not outputs:
        msg = "settlement without outputs"
        raise ValueError(msg)
    return tuple(outputs)


_Lock: TypeAlias = tuple[bytes, Callable[[bytes], Unlocking]]
"""Digest of an input, and the function that makes its script and witness of a signature without flag."""


class Unsigned:
    """A transaction without the server's signatures, one of which each input needs."""

    __slots__ = ("_fee_sat", "_locks", "_transaction")

    def __init__(self, transaction: UnsignedTransaction, locks: Sequence[_Lock], fee_sat: Sat) -> None:
        self._transaction = transaction
        self._locks = locks
        self._fee_sat = fee_sat

    @property
    def digests(self) -> list[bytes]:
        """Digests for the SIGHASH_ALL signatures, in the order of the inputs."""
        return [digest for digest, _ in self._locks]

    def signed(self, signatures: Sequence[bytes]) -> Settlement:
        """Put in strict DER signatures of the digests."""
        pairs = zip(self._locks, signatures, strict=True)
        raw, txid = self._transaction.signed([unlock(signature) for (_, unlock), signature in pairs])
        return Settlement(raw, txid, self._fee_sat)

    def signed_by(self, sign: Sign) -> Settlement:
        """Have each digest signed in turn."""
        return self.signed([sign(index, digest) for index, digest in enumerate(self.digests)])


def prepare_settlement(
    claims: Sequence[Claim], destination_script: bytes, fee_sat: Sat, reserve: Reserve | None = None
) -> Unsigned:
    """Build an unsigned settlement; the inputs after the claims' are the reserve's coins. Raises ValueError."""
    transaction = build_settlement(claims, destination_script, fee_sat, reserve)
    locks: list[_Lock] = []
    for index, claim in enumerate(claims):
        kind = claim.terms.kind
        digest = kind.settlement_digest(transaction, index, claim.terms, claim.funding_sat)
        locks.append((digest, partial(kind.input, claim)))
    if reserve:
        locks += [_key_lock(transaction, len(claims) + at, reserve.public_key) for at in range(len(reserve.coins))]
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
    weights = [claim.terms.kind.input_weight(claim) for claim in claims]
    weights += [key_input_weight(reserve.public_key)] * len(reserve.coins) if reserve else []
    with_witness = sum(claim.terms.kind.has_witness for claim in claims)
    return size_of(weights, [script for _, script in outputs], with_witness)


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
    output = OutPoint(parent.txid, index)
    child = UnsignedTransaction([output], [(Sat(value_sat - fee_sat), script)], [SIGNALLING_SEQUENCE])
    return Unsigned(child, [_key_lock(child, 0, public_key)], fee_sat)


def sign_child(parent: Settlement, public_key: bytes, fee_sat: Sat, sign: Sign) -> Settlement:
    """Build and sign a child, see `prepare_child`."""
    return prepare_child(parent, public_key, fee_sat).signed_by(sign)


def sweep_size(public_keys: Sequence[bytes], script: bytes) -> int:
    """Largest size in bytes of a transaction of `prepare_sweep`."""
    return size_of([key_input_weight(key) for key in public_keys], [script])


def prepare_sweep(coins: Sequence[tuple[Coin, bytes]], script: bytes, fee_sat: Sat) -> Unsigned:
    """Spend outputs to keys (P2PKH), each named with its public key, to one script.

    Raises:
        ValueError: no coins, or the fee is not below their value.
    """
    value_sat = sum(coin.value_sat for coin, _ in coins)
    if not 0 <= fee_sat < value_sat:
        msg = f"fee of {fee_sat} sat does not fit coins of {value_sat} sat"
        raise ValueError(msg)
    outputs = [(Sat(value_sat - fee_sat), script)]
    spent = [coin.outpoint for coin, _ in coins]
    sweep = UnsignedTransaction(spent, outputs, [SIGNALLING_SEQUENCE] * len(spent))
    return Unsigned(sweep, [_key_lock(sweep, index, key) for index, (_, key) in enumerate(coins)], fee_sat)


def outpoints_of(transaction: bytes) -> list[OutPoint]:
    """List the outpoints that a transaction spends, in order."""
    inputs = CTransaction.deserialize(transaction).vin
    return [OutPoint(bytes(txin.prevout.hash), int(txin.prevout.n)) for txin in inputs]


def base_size(transaction: bytes) -> int:
    """Count bytes without witnesses: at most the virtual bytes (BIP141)."""
    whole = CTransaction.deserialize(transaction)
    return len(CTransaction(whole.vin, whole.vout).serialize())


def spends_by_server_branch(transaction: bytes, outpoint: OutPoint) -> bool:
    """Say whether a transaction spends a channel's output through the branch that needs the server's signature.

    If it does, it is one of the settlements that the server signed, whatever its txid: others can change the selector
    and the client's signature (threat 18), but not the server's SIGHASH_ALL signature over the outputs. The other
    branch is the client's refund.
    """
    found = spend_of(CTransaction.deserialize(transaction), outpoint)
    return found is not None and found[1].by_server


def spend_of(transaction: CTransaction, outpoint: OutPoint) -> tuple[int, Spend] | None:
    """Return the index of the input that spends a channel's output, and its parts; None if no input does."""
    for index, (txin, unlocking) in enumerate(zip(transaction.vin, unlockings_of(transaction), strict=True)):
        if (bytes(txin.prevout.hash), int(txin.prevout.n)) == (outpoint.txid, outpoint.vout):
            spend = recognise(unlocking)
            return None if spend is None else (index, spend)
    return None


def first_output_sat(transaction: bytes) -> Sat:
    """Value of output 0 in satoshi; in a withdrawal it funds the continued channel."""
    return Sat(CTransaction.deserialize(transaction).vout[0].nValue)


def _key_lock(transaction: UnsignedTransaction, index: int, public_key: bytes) -> _Lock:
    return key_digest(transaction, index, public_key), partial(key_input, public_key)
