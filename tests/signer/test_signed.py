"""Signed settlements are read from a copy of the ledger, while the signer writes to it."""

from __future__ import annotations

import asyncio
from contextlib import closing
from pathlib import Path

import pytest

from paychan.protocol.settlement import Settlement
from paychan.protocol.types import Sat
from signer.keys.ring import KeyRing, hardened_keys
from signer.ledger.base import Entry, LedgerFailed
from signer.ledger.entries import entries_of, request_digest
from signer.ledger.leveldb import LevelDbLedger
from signer.ledger.signed import signed_settlements
from tests.signer.messages import make_request, mutated

REQUEST = make_request(KeyRing([hardened_keys(bytes(32))]), drained=2)
WRITES, TRANSACTION_BYTES = 300, 50_000
"""More than LevelDB keeps in memory (4 MB), several times: it begins and removes files meanwhile."""


def test_each_copy_has_all_that_was_on_disk(tmp_path: Path) -> None:
    """Every copy that is made during the writes holds what was written before it, and no copy is left."""
    path = tmp_path / "ledger"
    counts = []

    async def write() -> None:
        with closing(LevelDbLedger(path, tmp_path / "audit")) as ledger:
            for fee in range(WRITES):
                request = mutated(REQUEST, "fee_sat", 5_000 + fee)
                digest = request_digest(request)
                settlement = Settlement(bytes([fee % 256]) * TRANSACTION_BYTES, digest, Sat(fee))
                ledger.keep(digest, settlement)
                await ledger.put(Entry(signed=entries_of(request, digest), request=request, digest=digest))
                if fee % 10 == 9:
                    reading = asyncio.to_thread(lambda: list(signed_settlements(path)))
                    more = [ledger.put(Entry(request=request, digest=digest)) for _ in range(3)]
                    counts.append((fee + 1, await reading))
                    for each in more:
                        await each

    asyncio.run(write())

    for written, found in counts:
        assert len(found) == written
        assert all(each.settlement is not None for each in found)
        assert {each.request.fee_sat for each in found} == set(range(5_000, 5_000 + written))
    assert len(list(path.glob("*.ldb"))) > 1
    assert not list(tmp_path.glob(".ledger-copy-*"))


def test_a_ledger_that_does_not_exist_is_a_sentence(tmp_path: Path) -> None:
    """Before the first signature there is nothing to read, and no directory appears."""
    with pytest.raises(LedgerFailed, match="has signed nothing yet"):
        list(signed_settlements(tmp_path / "ledger"))
    assert not list(tmp_path.iterdir())
