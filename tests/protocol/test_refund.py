"""Refunds: Core's interpreter accepts them, but not before the lock time (RBPCP §8.3)."""

from __future__ import annotations

import pytest
from bitcoin.core import CTransaction, CTxIn
from bitcoin.core.script import CScript

from paychan.protocol.address import key_script
from paychan.protocol.kinds.base import SIGHASH_ALL
from paychan.protocol.kinds.refund import REFUND_SEQUENCE, Coin, Refund, refunds_at_rate, sign_refund
from paychan.protocol.types import Sat, UnixTime
from tests.lib.channels import Payer, private_key
from tests.lib.kernel import interpreter_accepts
from tests.lib.looped import looped
from tests.lib.sighash import whole_transaction_digest

HOME = key_script(private_key("refund").public_key.format())
PAYERS = {
    "4-byte expiry": Payer("refund", UnixTime(500_000_000)),
    "2038, the last of 4 bytes": Payer("refund", UnixTime(2**31 - 1)),
    "2038, the first of 5 bytes": Payer("refund", UnixTime(2**31)),
    "the last expiry": Payer("refund", UnixTime(2**32 - 1)),
}
each_payer = pytest.mark.parametrize("payer", PAYERS.values(), ids=PAYERS)


def refund_of(payer: Payer, fee_sat: int = 1000) -> Refund:
    """A payer's refund of everything."""
    return sign_refund(payer.key, payer.terms, payer.outpoint, payer.funding_sat, HOME, Sat(fee_sat))


def accepts(payer: Payer, transaction: bytes) -> bool:
    """Say whether Core's interpreter accepts a refund."""
    return interpreter_accepts(payer.terms.funding_script, transaction, 0, payer.funding_sat)


def signed_otherwise(payer: Payer, *, lock_time: int, sequence: int) -> bytes:
    """A refund that the client signs with another lock time or sequence, to get an earlier one."""
    usual = CTransaction.deserialize(refund_of(payer).transaction)
    script = payer.terms.redeem_script

    def transaction(script_sig: bytes) -> CTransaction:
        inputs = [CTxIn(usual.vin[0].prevout, CScript(script_sig), sequence)]
        return CTransaction(inputs, usual.vout, nLockTime=lock_time, nVersion=1)

    digest = whole_transaction_digest(transaction(b""), 0, script)
    signature = payer.key.sign(digest, hasher=None) + bytes([SIGHASH_ALL])
    script_sig = bytes([len(signature)]) + signature + b"\x00\x4c" + bytes([len(script)]) + script
    return bytes(transaction(script_sig).serialize())


@each_payer
def test_core_takes_the_refund(payer: Payer) -> None:
    """The refund is valid for every length of expiry, on both sides of 2038, and pays all but the fee."""
    refund = refund_of(payer)

    assert accepts(payer, refund.transaction)
    transaction = CTransaction.deserialize(refund.transaction)
    assert [(out.nValue, bytes(out.scriptPubKey)) for out in transaction.vout] == [(payer.funding_sat - 1000, HOME)]
    assert (transaction.nLockTime, transaction.vin[0].nSequence) == (payer.expiry, REFUND_SEQUENCE)
    assert transaction.GetTxid() == refund.txid


@each_payer
def test_core_refuses_every_changed_byte(payer: Payer) -> None:
    """A flipped bit in any byte of a refund makes it invalid."""
    raw = refund_of(payer).transaction
    for position in range(len(raw)):
        changed = raw[:position] + bytes([raw[position] ^ 1]) + raw[position + 1 :]

        assert not accepts(payer, changed), f"byte {position} of {raw.hex()}"


@each_payer
def test_the_client_can_not_take_it_back_earlier(payer: Payer) -> None:
    """BIP65: a lock time before the expiry fails even with a valid signature; so does a block height."""
    assert accepts(payer, signed_otherwise(payer, lock_time=payer.expiry, sequence=REFUND_SEQUENCE))
    for earlier in {payer.expiry - 1, 499_999_999, 500_000_000, 1, 0} - {payer.expiry}:
        assert not accepts(payer, signed_otherwise(payer, lock_time=earlier, sequence=REFUND_SEQUENCE))


@each_payer
def test_a_final_sequence_would_switch_the_lock_off(payer: Payer) -> None:
    """BIP65 fails an input with a final sequence, because the lock time would have no effect."""
    assert not accepts(payer, signed_otherwise(payer, lock_time=payer.expiry, sequence=0xFFFFFFFF))


def test_the_client_alone_can_not_take_the_server_branch() -> None:
    """With OP_1 in place of OP_0 the refund would need the server's signature too."""
    payer = PAYERS["4-byte expiry"]
    raw = refund_of(payer).transaction
    script = payer.terms.redeem_script

    assert not accepts(payer, raw.replace(b"\x00\x4c\x50" + script, b"\x51\x4c\x50" + script))


@looped("fee_sat", [-1, 1_000_000, 1_000_001])
def test_a_fee_that_does_not_fit_is_refused(fee_sat: int) -> None:
    """A negative fee, or one that leaves nothing, is a bug of the caller; the error has both numbers."""
    with pytest.raises(ValueError, match=f"fee of {fee_sat} sat does not fit a funding output of 1000000 sat"):
        refund_of(PAYERS["4-byte expiry"], fee_sat)


@looped("rate", [0, 1, 25])
def test_a_rate_is_paid_on_the_real_size(rate: int) -> None:
    """The fee is the rate times the size of the refund without a fee, whose signature may differ by a few bytes."""
    payer = PAYERS["4-byte expiry"]

    refund = refunds_at_rate(payer.key, payer.terms, [Coin(payer.outpoint, payer.funding_sat)], HOME, rate)

    assert refund.fee_sat == rate * len(refund_of(payer, 0).transaction)
    assert accepts(payer, refund.transaction)
