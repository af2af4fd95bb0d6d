"""Settlement: how the server takes what channels owe it, alone or several in one transaction (PROTOCOL §8).

Server and signer both build from the same meaning (`Claim`s, destination, fee), so the signer signs only what it
rebuilt itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from bitcoin.core import COutPoint as TxOutPoint
from bitcoin.core import CTransaction, CTxIn, CTxOut
from bitcoin.core.script import CScript
from msgspec import Struct

from paychan.protocol.payment import Payment, change_problem
from paychan.protocol.scripts import ChannelTerms
from paychan.protocol.sighash import SIGHASH_ALL, SINGLE_ANYONECANPAY, whole_transaction_digest
from paychan.protocol.types import OutPoint, Sat

FINAL_SEQUENCE = 0xFFFFFFFF
"""Part of what the client signed (PROTOCOL §3)."""

MAX_SIGNATURE_BYTES = 72
"""A low-S DER signature of secp256k1 has at most 71 bytes, and one byte of hash flag."""

RELAY_FLOOR_SAT_PER_VB = 1
"""Bitcoin Core's long-standing -minrelaytxfee; a settlement that pays less is not relayed everywhere."""

_MAX_CLIENT_FEE_FACTOR = 4
"""A client may offer to pay up to this multiple of our own fee; more would only be refused by the signer's policy."""

_LEAST_CHANGE = Sat(1)
"""Dust is the caller's business; here the flag must fit."""

_SERVER_BRANCH = b"\x51"  # OP_1 selects the IF branch


class Claim(Struct, frozen=True, array_like=True):
    """What one channel contributes to a settlement: where the coins are, and the newest payment out of them."""

    terms: ChannelTerms
    outpoint: OutPoint
    funding_sat: Sat
    change_script: bytes
    payment: Payment

    @property
    def received_sat(self) -> Sat:
        """What belongs to the server, in satoshi."""
        return Sat(self.funding_sat - self.payment.change_sat)


class Settlement(Struct, frozen=True, array_like=True):
    """A signed settlement and the fee it pays."""

    transaction: bytes
    txid: bytes
    fee_sat: Sat


class Shortfall(Struct, frozen=True):
    """Why claims can't be settled: they received less than any relayed settlement of them costs."""

    received_sat: Sat
    needed_sat: Sat


def build_settlement(claims: Sequence[Claim], destination_script: bytes, fee_sat: Sat) -> CTransaction:
    """Lay out the unsigned settlement; what the fee leaves goes to the destination, and 0 means no output for it.

    Raises:
        ValueError: a fee that is negative or exceeds what was received, or a layout that can't be signed.
    """
    server_sat = sum(claim.received_sat for claim in claims) - fee_sat
    if server_sat < 0 or fee_sat < 0 or any(claim.received_sat < 0 for claim in claims):
        msg = f"fee of {fee_sat} sat does not fit claims of {server_sat + fee_sat} sat"
        raise ValueError(msg)
    return _layout(claims, destination_script, Sat(server_sat))


def _layout(claims: Sequence[Claim], destination_script: bytes, server_sat: Sat) -> CTransaction:
    """Pair inputs and outputs.

    SINGLE ties the client's output to the index of its input, and the legacy sighash of index i holds i blank outputs
    before it: so at most one claim with change, as input 0 with its change as output 0; drained claims fit anywhere.
    """
    if any(change_problem(claim.payment, _LEAST_CHANGE) for claim in claims):
        msg = "a payment's flag does not fit its change"
        raise ValueError(msg)
    if any(claim.payment.flag == SINGLE_ANYONECANPAY for claim in claims[1:]):
        msg = "a claim with change must be input 0"
        raise ValueError(msg)
    outputs = []
    if claims[0].payment.flag == SINGLE_ANYONECANPAY:
        outputs.append(CTxOut(claims[0].payment.change_sat, CScript(claims[0].change_script)))
    if server_sat:
        outputs.append(CTxOut(server_sat, CScript(destination_script)))
    if not outputs:
        msg = "settlement without outputs"
        raise ValueError(msg)
    inputs = [CTxIn(TxOutPoint(c.outpoint.txid, c.outpoint.vout), nSequence=FINAL_SEQUENCE) for c in claims]
    return CTransaction(inputs, outputs, nLockTime=0, nVersion=1)


def sign_settlement(
    claims: Sequence[Claim], destination_script: bytes, fee_sat: Sat, sign: Callable[[int, bytes], bytes]
) -> Settlement:
    """Build and sign. `sign(index, digest)` returns the server's strict DER signature for the claim at that index."""
    unsigned = build_settlement(claims, destination_script, fee_sat)
    inputs = []
    for index, (claim, txin) in enumerate(zip(claims, unsigned.vin, strict=True)):
        digest = whole_transaction_digest(unsigned, index, claim.terms.redeem_script)
        script = _script_sig(claim, sign(index, digest) + bytes([SIGHASH_ALL]))
        inputs.append(CTxIn(txin.prevout, script, txin.nSequence))
    signed = CTransaction(inputs, unsigned.vout, nLockTime=0, nVersion=1)
    return Settlement(signed.serialize(), signed.GetTxid(), fee_sat)


def pays_the_same(settlement: bytes, other: bytes) -> bool:
    """Say whether two signed transactions differ in nothing but their scriptSigs.

    Then the other is the settlement, malleated on its way (threat 18): it carries our signature over these outputs.
    """
    return _unsigned(CTransaction.deserialize(settlement)) == _unsigned(CTransaction.deserialize(other))


def _unsigned(transaction: CTransaction) -> bytes:
    inputs = [CTxIn(txin.prevout, nSequence=txin.nSequence) for txin in transaction.vin]
    blank = CTransaction(inputs, transaction.vout, nLockTime=transaction.nLockTime, nVersion=transaction.nVersion)
    return bytes(blank.serialize())


def settlement_size(claims: Sequence[Claim], destination_script: bytes, *, server_output: bool = True) -> int:
    """Size in (v)bytes once signed; too large by what a server signature is shorter than the longest."""
    unsigned = _layout(claims, destination_script, Sat(1 if server_output else 0))
    placeholder = b"\x00" * MAX_SIGNATURE_BYTES
    return len(unsigned.serialize()) + sum(len(_script_sig(claim, placeholder)) for claim in claims)


def plan_fee(
    claims: Sequence[Claim],
    destination_script: bytes,
    rate_sat_per_vb: int,
    dust_sat: Sat,
    *,
    client_fee_sat: Sat = Sat(0),
    may_give_all: bool = False,
) -> Sat | Shortfall:
    """Choose the fee of a settlement in satoshi (PROTOCOL §8.1, without its zero and dust outputs).

    The wanted fee is the rate times the size, or what the client offered to pay if that is more, within reason. Where
    it would leave the server less than dust, it is lowered, down to the relay floor. `may_give_all`: the client asked
    to be settled; when even that leaves no output for the server, all it received becomes the fee, provided the client
    has change.
    """
    received = Sat(sum(claim.received_sat for claim in claims))
    size = settlement_size(claims, destination_script)
    wanted = size * max(rate_sat_per_vb, RELAY_FLOOR_SAT_PER_VB)
    need = size * RELAY_FLOOR_SAT_PER_VB + dust_sat
    if received >= need:
        offered = min(client_fee_sat, _MAX_CLIENT_FEE_FACTOR * wanted)
        return Sat(min(max(wanted, offered), received - dust_sat))
    if may_give_all and claims[0].payment.flag == SINGLE_ANYONECANPAY:
        need = settlement_size(claims, destination_script, server_output=False) * RELAY_FLOOR_SAT_PER_VB
        if received >= need:
            return received
    return Shortfall(received, Sat(need))


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
