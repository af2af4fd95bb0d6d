"""Reads funding transactions that the server shows: outputs by outpoint. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from bitcoin.core import CTransaction
from bitcoin.core.serialize import SerializationError

from paychan.protocol.address import is_key_script
from paychan.protocol.kinds.base import is_funding_script
from paychan.protocol.types import MAX_MONEY_SAT, OutPoint, Sat, UnixTime
from paychan.protocol.wire.signer_messages import MAX_CLAIMS
from signer.ledger.entries import Output


class FundingProblem(Exception):
    """The bytes are not a transaction, or it has no such outputs."""


def shown_outputs(transaction: bytes, outputs: Sequence[int], now: UnixTime = UnixTime(0)) -> dict[OutPoint, Output]:
    """Read outputs of a transaction that is serialized without witness, so that its hash is its txid.

    Raises:
        FundingProblem: the transaction or one of the outputs can't be used.
    """
    if not 1 <= len(outputs) <= MAX_CLAIMS:
        msg = f"got {len(outputs)} outputs, want 1 to {MAX_CLAIMS}"
        raise FundingProblem(msg)
    try:
        parsed = CTransaction.deserialize(transaction)
    except (SerializationError, ValueError, OverflowError, MemoryError) as error:
        msg = f"no transaction in {len(transaction)} bytes: {error}"
        raise FundingProblem(msg) from None
    if parsed.serialize() != transaction or parsed.has_witness():
        msg = "not serialized as for its txid: the bytes have witnesses, or more bytes follow"
        raise FundingProblem(msg)
    txid = bytes(parsed.GetTxid())
    return {OutPoint(txid, index): _output(parsed, index, now) for index in outputs}


def _output(parsed: CTransaction, index: int, now: UnixTime) -> Output:
    if not 0 <= index < len(parsed.vout):
        msg = f"output {index} of {len(parsed.vout)}"
        raise FundingProblem(msg)
    value_sat, script = int(parsed.vout[index].nValue), bytes(parsed.vout[index].scriptPubKey)
    if not 0 < value_sat <= MAX_MONEY_SAT:
        msg = f"output {index} of {value_sat} sat, want 1 to {MAX_MONEY_SAT}"
        raise FundingProblem(msg)
    if not (is_key_script(script) or is_funding_script(script)):
        msg = f"output {index} pays to a script of {len(script)} bytes that is not P2PKH and funds no channel"
        raise FundingProblem(msg)
    return Output(Sat(value_sat), script, now)
