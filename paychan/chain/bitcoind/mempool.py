"""The mempool of a bitcoind: the fees that it requires, its transactions, and broadcasts.

Errors are distinguished by code, never by text, which differs between versions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from decimal import Decimal

import msgspec
from bitcoin.core import CTransaction
from msgspec import Struct

from paychan.chain.base import ChainFailed
from paychan.chain.bitcoind.rpc import JsonRpc, RpcError
from paychan.chain.bitcoind.wallet import NOT_FOUND, WatchWallet
from paychan.protocol.fees import ChainFees
from paychan.protocol.types import OutPoint, Sat

_FEE_TARGET_BLOCKS = 12
"""Two hours: a settlement has the whole settlement period."""

_ALREADY_IN_CHAIN = -27
"""Bitcoin Core, rpc/protocol.h: RPC_VERIFY_ALREADY_IN_UTXO_SET"""

_NO_LIMIT = 0
"""Turns the node's own limit of fee rates off: the fee was decided and signed elsewhere, within the signer's limits, and a
settlement that the node held back would be lost to the payer's refund."""

_ALL_IN_MEMPOOL = "success"
"""help submitpackage: "success" indicates all transactions were accepted into or are already in the mempool."""

_DEFAULT_RATE = Decimal("0.00001")
"""BTC per 1000 vB: the default that is assumed for a node that does not report its own rate."""

_SAT_PER_COIN = 100_000_000
_VB_PER_KVB = 1000


class _Estimate(Struct, frozen=True):
    feerate: Decimal | None = None


class _Info(Struct, frozen=True):
    """In BTC per 1000 vB. The minimum of a full mempool (mempoolminfee) rises with the rates that it had to evict."""

    mempoolminfee: Decimal = _DEFAULT_RATE
    minrelaytxfee: Decimal = _DEFAULT_RATE
    incrementalrelayfee: Decimal = _DEFAULT_RATE


class _Fees(Struct, frozen=True):
    descendant: Decimal


class _Entry(Struct, frozen=True):
    fees: _Fees


class _Verdict(Struct, frozen=True, rename={"reason": "reject-reason"}):
    allowed: bool = False
    reason: str = "no reason given"


class _PackageEntry(Struct, frozen=True):
    txid: str
    error: str = ""


class _PackageVerdict(Struct, frozen=True, rename={"message": "package_msg", "entries": "tx-results"}):
    message: str = "no reason given"
    entries: dict[str, _PackageEntry] = {}


class _Prevout(Struct, frozen=True):
    spendingtxid: str | None = None


_REFUSED = _Estimate()

_text: msgspec.json.Decoder[str] = msgspec.json.Decoder(str)
_estimate: msgspec.json.Decoder[_Estimate] = msgspec.json.Decoder(_Estimate)
_info: msgspec.json.Decoder[_Info] = msgspec.json.Decoder(_Info)
_entry: msgspec.json.Decoder[_Entry] = msgspec.json.Decoder(_Entry)
_verdicts: msgspec.json.Decoder[list[_Verdict]] = msgspec.json.Decoder(list[_Verdict])
_package_verdict: msgspec.json.Decoder[_PackageVerdict] = msgspec.json.Decoder(_PackageVerdict)
_prevouts: msgspec.json.Decoder[list[_Prevout]] = msgspec.json.Decoder(list[_Prevout])
_tx_out: msgspec.json.Decoder[msgspec.Raw] = msgspec.json.Decoder(msgspec.Raw)


class NodeMempool:
    """The mempool of the node behind `rpc`; `wallet` knows the confirmed spends of watched outputs."""

    def __init__(self, rpc: JsonRpc, wallet: WatchWallet) -> None:
        self._rpc = rpc
        self._wallet = wallet
        self.estimates = True
        """Whether the node answers requests for an estimate, even if it has none yet."""

    async def fees(self) -> ChainFees:
        """Return the node's estimate, if any, and its required fees, in whole satoshi per virtual byte, rounded up.

        A node that refuses to estimate (blocksonly), or lacks a figure, is no failure: floor and curve suffice.
        """
        answer = await self._rpc.call_if_possible(_REFUSED, _estimate, "estimatesmartfee", _FEE_TARGET_BLOCKS)
        self.estimates = answer is not _REFUSED
        estimate = answer.feerate
        info = await self._rpc.call_if_possible(_Info(), _info, "getmempoolinfo")
        return ChainFees(
            estimate_sat_per_vb=None if estimate is None else _sat_per_vb(estimate),
            floor_sat_per_vb=_sat_per_vb(max(info.mempoolminfee, info.minrelaytxfee)),
            increment_sat_per_vb=_sat_per_vb(info.incrementalrelayfee),
        )

    async def replacement_cost(self, txid: bytes) -> Sat | None:
        """Return the fees of a transaction and of all its descendants; None if it is not in the mempool.

        They are the modified fees, which the node uses to judge a replacement: `prioritisetransaction` changes them.
        """
        try:
            entry = await self._rpc.call(_entry, "getmempoolentry", OutPoint(txid, 0).txid_hex)
        except RpcError as error:
            if error.code != NOT_FOUND:
                raise
            return None
        return Sat(int(entry.fees.descendant * _SAT_PER_COIN))

    async def spender(self, outpoint: OutPoint) -> bytes | None:
        """Return the txid of the transaction that spends an output in the mempool."""
        query = [{"txid": outpoint.txid_hex, "vout": outpoint.vout}]
        txid = (await self._rpc.call(_prevouts, "gettxspendingprevout", query))[0].spendingtxid
        return None if txid is None else OutPoint.parse(txid, 0).txid

    async def publish(self, transaction: bytes) -> None:
        """Broadcast a transaction, again if it is already in the mempool: then the node announces it to its peers again.

        Raises:
            ChainFailed: refused, with the node's reason.
        """
        parsed = CTransaction.deserialize(transaction)
        verdicts = await self._rpc.call(_verdicts, "testmempoolaccept", [transaction.hex()], _NO_LIMIT)
        if not verdicts[0].allowed:
            if await self._is_confirmed(parsed):
                return
            if await self.spender(_first_input(parsed)) != parsed.GetTxid():
                msg = f"transaction {_shown(parsed)} refused: {verdicts[0].reason}"
                raise ChainFailed(msg)
        try:
            await self._rpc.call(_text, "sendrawtransaction", transaction.hex(), _NO_LIMIT)
        except RpcError as error:
            # a block may have arrived since the test
            if error.code != _ALREADY_IN_CHAIN and not await self._is_confirmed(parsed):
                msg = f"transaction {_shown(parsed)} refused: {error.reason}"
                raise ChainFailed(msg) from error

    async def publish_package(self, parent: bytes, child: bytes) -> None:
        """Broadcast a transaction and a child that spends from it and may pay for both.

        A child can't help a parent below `-minrelaytxfee`. It helps one below the current minimum of a full mempool, or
        below the transactions that it is to replace: one, or two of which one spends from the other. If the package is
        refused, the transactions are broadcast one by one: the parent may be confirmed, or the node (Core 25 and 26)
        may not accept such a package.

        Raises:
            ChainFailed: one of them is neither in the mempool nor confirmed, with the node's reasons; the other may be.
        """
        reasons = await self._submit([parent, child])
        if not reasons:
            return
        try:
            for transaction in (parent, child):
                await self.publish(transaction)
        except ChainFailed as failure:
            msg = f"{failure}; with its child: {reasons}"
            raise ChainFailed(msg) from failure

    async def _submit(self, package: Sequence[bytes]) -> str:
        """Return the reason of a refusal, or an empty text."""
        package_hex = [transaction.hex() for transaction in package]
        try:
            verdict = await self._rpc.call(_package_verdict, "submitpackage", package_hex, _NO_LIMIT)
        except RpcError as error:
            return str(error)
        if verdict.message == _ALL_IN_MEMPOOL:
            return ""
        errors = [f"{entry.txid}: {entry.error}" for entry in verdict.entries.values() if entry.error]
        return "; ".join([verdict.message, *errors])

    async def _is_confirmed(self, transaction: CTransaction) -> bool:
        """Return whether one of its outputs is unspent in the chain, or the wallet knows that it spent a watched output."""
        in_mempool = False
        calls = [[_shown(transaction), vout, in_mempool] for vout in range(len(transaction.vout))]
        if any(bytes(tx_out) != b"null" for tx_out in await self._rpc.batch(_tx_out, "gettxout", calls)):
            return True
        spend = await self._wallet.spender(_first_input(transaction))
        return spend is not None and spend.txid == transaction.GetTxid()


def _sat_per_vb(coins_per_kvb: Decimal) -> int:
    return max(math.ceil(coins_per_kvb * _SAT_PER_COIN / _VB_PER_KVB), 1)


def _first_input(transaction: CTransaction) -> OutPoint:
    return OutPoint(bytes(transaction.vin[0].prevout.hash), int(transaction.vin[0].prevout.n))


def _shown(transaction: CTransaction) -> str:
    return OutPoint(bytes(transaction.GetTxid()), 0).txid_hex
