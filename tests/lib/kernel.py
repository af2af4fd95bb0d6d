"""Bitcoin Core's own script interpreter (libbitcoinkernel), which verifies the transactions that the code builds.

It verifies one input's scripts by the consensus rules alone. It does not know policy (low S, standard scripts, dust,
fees, size), finality (whether a lock time has passed), or coins (whether the output exists, whether the amounts add
up). A transaction that it accepts may still not be relayed; a transaction that it refuses is never valid.
"""

from __future__ import annotations

from pbk import ScriptPubkey, ScriptVerificationFlags, Transaction, TransactionOutput
from pbk.script import PrecomputedTransactionData

_FLAGS = ScriptVerificationFlags.ALL  # P2SH, DERSIG, NULLDUMMY, CLTV, CSV, WITNESS, TAPROOT: every rule that it offers


def interpreter_accepts(script_pubkey: bytes, transaction: bytes, index: int, amount_sat: int) -> bool:
    """Say whether input `index` of a serialized transaction may spend an output of this script and amount.

    Bytes that are no transaction are refused. The legacy sighash does not cover amounts, so any other amount gives the
    same result, and this output may stand for those of the other inputs.
    """
    try:
        spender = Transaction(transaction)
    except RuntimeError:
        return False
    output = TransactionOutput(ScriptPubkey(script_pubkey), amount_sat)
    known = PrecomputedTransactionData(spender, [output] * len(spender.inputs))
    return bool(ScriptPubkey(script_pubkey).verify(amount_sat, spender, known, index, _FLAGS))


def interpreter_reads(signature_with_flag: bytes) -> bool:
    """Say whether Core accepts these bytes as a signature in strict DER, of any digest, also with high S.

    BIP66: "F P1 CHECKSIG NOT can succeed", "F' P1 CHECKSIG NOT fails", where F is an invalid signature in DER, F' not.
    """
    push = bytes([0x4C, len(signature_with_flag)]) + signature_with_flag
    unsigned = b"\x01\x00\x00\x00\x01" + bytes(36)
    outputs_and_time = b"\xff\xff\xff\xff\x01" + bytes(8) + b"\x00" + bytes(4)
    transaction = unsigned + bytes([len(push)]) + push + outputs_and_time
    return interpreter_accepts(_CHECKSIG_NOT, transaction, 0, 0)


_CHECKSIG_NOT = bytes.fromhex("210279be667ef9dcbbac55a06295ce870b07029bfcdb2dce28d959f2815b16f81798ac91")
"""`<the curve's generator> CHECKSIG NOT`: no test signs with the generator's key."""
