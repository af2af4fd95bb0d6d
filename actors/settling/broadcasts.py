"""Broadcasts since the last block, and settlements that the node does not replace until the next one."""

from __future__ import annotations

import structlog

from actors.context import Context
from paychan.protocol.settlement import Settlement
from paychan.protocol.tx import signals_replaceability

log = structlog.get_logger("broadcasts")


class Broadcasts:
    """Forgets everything at each block: then settlements are broadcast and replaced again."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._since_block: tuple[str, set[bytes]] = ("", set())
        self._kept = set[bytes]()

    def may_replace(self, settlement: Settlement) -> bool:
        """Say whether the node would replace this settlement of the server's in its mempool."""
        if signals_replaceability(settlement.transaction):
            return True
        return self._context.chain.capabilities.full_rbf is not False and settlement.txid not in self._kept

    def note_kept(self, settlement: Settlement, reason: str) -> None:
        """Note that the node has just refused to replace a settlement: until the next block, only children add fees."""
        log.warning("the node does not replace the settlement", txid=settlement.txid[::-1].hex(), reason=reason)
        self._kept.add(settlement.txid)

    def may_repeat(self, settlement: Settlement) -> bool:
        """Say, once after each block, whether to broadcast a settlement again."""
        tip = self._context.chain_view.tip
        if tip is not None and tip.block_hash != self._since_block[0]:
            self._since_block = tip.block_hash, set()
            self._kept.clear()
        new = settlement.txid not in self._since_block[1]
        self.note(settlement)
        return new

    def note(self, settlement: Settlement) -> None:
        """Note that the settlement was broadcast since the last block."""
        self._since_block[1].add(settlement.txid)
