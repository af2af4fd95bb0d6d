"""`UnsignedTransaction` gives the same bytes as python-bitcoinlib."""

from __future__ import annotations

import pytest
from bitcoin.core import COutPoint, CTransaction, CTxIn, CTxOut
from bitcoin.core.script import SIGHASH_ALL, CScript, SignatureHash
from bitcoin.core.serialize import VarIntSerializer
from hypothesis import given
from hypothesis import strategies as st

from paychan.protocol.address import p2pkh_script
from paychan.protocol.expiry import MAX_EXPIRY, MIN_EXPIRY, Expiry
from paychan.protocol.kinds.base import ChannelTerms
from paychan.protocol.tx import FINAL_SEQUENCE, UnsignedTransaction, varint
from paychan.protocol.types import MAX_MONEY_SAT, OutPoint, Sat
from tests.lib.looped import looped

OUTPOINTS = st.builds(OutPoint, st.binary(min_size=32, max_size=32), st.integers(0, 0xFFFFFFFF))
SCRIPTS = st.binary(max_size=300)
KEYS = st.binary(min_size=33, max_size=33)
SCRIPT_CODES = st.builds(p2pkh_script, st.binary(min_size=20, max_size=20)) | st.builds(
    lambda *terms: ChannelTerms("p2sh", *terms).redeem_script,
    KEYS,
    KEYS,
    st.integers(MIN_EXPIRY, MAX_EXPIRY).map(Expiry),
)
OUTPUTS = st.tuples(st.integers(0, MAX_MONEY_SAT), SCRIPTS)


def built(ours: UnsignedTransaction, scripts: list[bytes]) -> CTransaction:
    """The same transaction, built by python-bitcoinlib."""
    inputs = [
        CTxIn(COutPoint(outpoint.txid, outpoint.vout), CScript(script), 0xFFFFFFFF)
        for outpoint, script in zip(ours.inputs, scripts, strict=True)
    ]
    return CTransaction(inputs, [CTxOut(value, CScript(script)) for value, script in ours.outputs], 0, 1)


@given(
    spent=st.lists(st.tuples(OUTPOINTS, SCRIPTS), min_size=1, max_size=5),
    paid=st.lists(OUTPUTS, min_size=1, max_size=4),
    script_code=SCRIPT_CODES,
    data=st.data(),
)
def test_bytes_and_digests_are_those_of_bitcoinlib(
    spent: list[tuple[OutPoint, bytes]], paid: list[tuple[Sat, bytes]], script_code: bytes, data: st.DataObject
) -> None:
    """Serialization, txid and the SIGHASH_ALL digest of each input agree."""
    ours = UnsignedTransaction([outpoint for outpoint, _ in spent], paid, [FINAL_SEQUENCE] * len(spent))
    scripts = [script for _, script in spent]
    theirs, index = built(ours, scripts), data.draw(st.integers(0, len(spent) - 1))

    assert ours.signed([(script, ()) for script in scripts]) == (theirs.serialize(), theirs.GetTxid())
    assert ours.serialize() == built(ours, [b""] * len(spent)).serialize()
    assert ours.legacy_digest(index, script_code) == SignatureHash(CScript(script_code), theirs, index, SIGHASH_ALL)


@looped("number", [0, 1, 0xFC, 0xFD, 0xFE, 0xFFFF, 0x10000, 0xFFFFFFFF])
def test_counts_are_written_as_bitcoin_does(number: int) -> None:
    """At every boundary of its size a count has the bytes of CompactSize."""
    assert varint(number) == VarIntSerializer.serialize(number)


@looped("index", [-1, 1])
def test_threat_15_no_digest_of_an_input_that_is_not_there(index: int) -> None:
    """The digest of a missing input would be the constant 1, valid for every transaction: it is never computed."""
    with pytest.raises(IndexError):
        UnsignedTransaction([OutPoint(bytes(32), 0)], [(Sat(1), b"")], [FINAL_SEQUENCE]).legacy_digest(index, b"\x51")
