"""A node's mempool, full of other transactions until it accepts only high fee rates, as in a fee spike.

The node must run with `-maxmempool=5`, the smallest limit of bitcoind.
"""

from __future__ import annotations

from contextlib import suppress
from decimal import Decimal
from hashlib import sha256
from math import ceil

from bitcoin.core import COIN, COutPoint, CTransaction, CTxIn, CTxOut
from bitcoin.core.script import OP_1, OP_2DROP, CScript
from msgspec import Struct

from paychan.protocol.types import OutPoint, Sat
from tests.lib.node import Node, NodeError

_ITEMS = 100
"""policy.h: MAX_STANDARD_P2WSH_STACK_ITEMS.

The mempool's limit counts memory, where an item of one byte takes a hundred times its virtual size. So a crowd of 5 MB
has only 0.1 MvB, costs little, and fits into one block.
"""

_UNLOCK = CScript([*[OP_2DROP] * (_ITEMS // 2), OP_1])
_LOCK = CScript([0, sha256(_UNLOCK).digest()])
_WITNESS = bytes([_ITEMS + 1]) + b"\x01\x01" * _ITEMS + bytes([len(_UNLOCK)]) + bytes(_UNLOCK)
"""Serialized stack of one input (BIP144). It needs no signature: any transaction with this stack may spend the coin."""

_TRANSACTIONS, _INPUTS = 75, 15
"""Somewhat more than the mempool can hold."""

_ESTIMATE_BLOCKS, _ESTIMATE_TRANSACTIONS = 8, 8
"""Blocks, and transactions in each, until there is an estimate.

block_policy_estimator.cpp: the longest target is half of the blocks seen, and a bucket of rates needs a tenth of a
transaction for each block.
"""

_COIN_SAT = Sat(COIN // 100)
"""Enough for a few crowds at 1,000 sat/vB."""

_TAKES_BACK_SECONDS = 2 * 86_400
"""Half-life of the minimum rate of an almost empty mempool: three hours (txmempool.cpp: GetMinFee)."""


class _Coin(Struct, frozen=True):
    outpoint: OutPoint
    value_sat: Sat


class CrowdedMempool:
    """The crowd of one node, which a test can add and remove repeatedly.

    At construction it mines a block for its coins. The node learns fee rates from the mined crowd, so
    `estimatesmartfee`, which has no estimate on regtest, then has one.

    Measured on two busy cores: 0.5 s to construct, 1 s to fill, 0.2 s to empty.
    """

    def __init__(self, node: Node) -> None:
        self._node = node
        outputs = [CTxOut(_COIN_SAT, _LOCK)] * (_TRANSACTIONS * _INPUTS)
        bare = CTransaction([], outputs).serialize().hex()
        whole = node.rpc("fundrawtransaction", bare, {"fee_rate": 2}, False, wallet="miner")["hex"]
        signed = node.rpc("signrawtransactionwithwallet", whole, wallet="miner")["hex"]
        node.mine_only(signed)  # also if the node's own blocks are smaller
        coins = _coins(CTransaction.deserialize(bytes.fromhex(signed)))
        self._groups = [coins[start : start + _INPUTS] for start in range(0, len(coins), _INPUTS)]
        self._spent: list[CTransaction | None] = [None] * _TRANSACTIONS

    @property
    def floor_sat_per_vb(self) -> Decimal:
        """Present minimum fee rate of the node."""
        return _sat_per_vb(self._node.rpc("getmempoolinfo")["mempoolminfee"])

    def fill(self, sat_per_vb: int) -> None:
        """Fill the mempool until this is its minimum rate, and lower rates are evicted. No block is mined.

        A crowd that is still there is replaced, so the rate must be higher than its rate.
        """
        self._follow_blocks()
        increment = _sat_per_vb(self._node.rpc("getmempoolinfo")["incrementalrelayfee"])
        for number, group in enumerate(self._groups):
            if self.floor_sat_per_vb >= sat_per_vb:
                break
            # an eviction raises the minimum to the evicted rate plus the increment
            transaction = _transaction(group, sat_per_vb - increment)
            with suppress(NodeError):  # mempool full: the node evicted this transaction itself
                self._node.send_raw(_with_witness(transaction))
                self._spent[number] = transaction
        assert self.floor_sat_per_vb == sat_per_vb, (self.floor_sat_per_vb, self._node.rpc("getmempoolinfo"))

    def teach(self, sat_per_vb: int) -> None:
        """Make `estimatesmartfee` return about this rate, by transactions that are mined within a few blocks.

        The node must have estimated nothing before, since earlier blocks still count.
        """
        self._follow_blocks()
        for first in range(0, _ESTIMATE_BLOCKS * _ESTIMATE_TRANSACTIONS, _ESTIMATE_TRANSACTIONS):
            sent = [
                _transaction(group, Decimal(sat_per_vb))
                for group in self._groups[first : first + _ESTIMATE_TRANSACTIONS]
            ]
            self._spent[first : first + _ESTIMATE_TRANSACTIONS] = sent
            self._node.mine_only(*(self._node.send_raw(_with_witness(transaction)) for transaction in sent))

    def empty(self, clock: int = 0) -> None:
        """Mine until the mempool is empty, and bring the minimum rate back to its default.

        For that the node's clock is set two days ahead, and then back to this Unix time; 0 lets the clock run.
        """
        while self._node.rpc("getrawmempool"):
            self._node.mine()
        self._node.set_mock_time(self._node.rpc("getblockheader", self._node.best)["time"] + _TAKES_BACK_SECONDS)
        self.floor_sat_per_vb  # noqa: B018 - reading the rate lets it fall
        self._node.set_mock_time(clock)

    def _follow_blocks(self) -> None:
        """Use the outputs of the mined transactions from now on."""
        for number, (group, spent) in enumerate(zip(self._groups, self._spent, strict=True)):
            first, in_mempool = group[0].outpoint, False
            if spent is not None and not self._node.rpc("gettxout", first.txid_hex, first.vout, in_mempool):
                self._groups[number] = _coins(spent)


def _transaction(coins: list[_Coin], sat_per_vb: Decimal) -> CTransaction:
    """Build a transaction that spends coins to as many of the same kind; the caller adds its witnesses."""
    inputs = [CTxIn(COutPoint(coin.outpoint.txid, coin.outpoint.vout)) for coin in coins]
    size = len(CTransaction(inputs, [CTxOut(0, _LOCK)] * len(coins)).serialize())
    virtual_size = size + ceil((2 + len(_WITNESS) * len(coins)) / 4)
    available = sum(coin.value_sat for coin in coins)
    outputs = [CTxOut((available - ceil(virtual_size * sat_per_vb)) // len(coins), _LOCK)] * len(coins)
    return CTransaction(inputs, outputs)


def _with_witness(transaction: CTransaction) -> bytes:
    bare = bytes(transaction.serialize())
    marker_and_flag = b"\x00\x01"
    return bare[:4] + marker_and_flag + bare[4:-4] + _WITNESS * len(transaction.vin) + bare[-4:]


def _coins(transaction: CTransaction) -> list[_Coin]:
    """Return the crowd's coins in a transaction of its own."""
    txid = bytes(transaction.GetTxid())
    return [
        _Coin(OutPoint(txid, number), Sat(output.nValue))
        for number, output in enumerate(transaction.vout)
        if output.scriptPubKey == _LOCK
    ]


def _sat_per_vb(btc_per_kvb: Decimal) -> Decimal:
    return Decimal(btc_per_kvb) * 100_000
