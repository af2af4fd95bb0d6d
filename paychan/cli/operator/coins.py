"""Finds the unspent coins on addresses through the server's node, and broadcasts a transaction, for `paychan coins`."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from bitcoin.core import CTransaction
from msgspec import Struct

from paychan.chain.base import Chain, ChainFailed
from paychan.cli.terminal import fail, say, show_table, warn
from paychan.config import load_server_config
from paychan.parts import StartError, open_chain
from paychan.protocol.address import decode_address
from paychan.protocol.errors import Malformed
from paychan.protocol.settings import SettingsError
from paychan.protocol.types import Network
from paychan.shared.called import quoted
from paychan.shared.layout import Column


class _Payee(Struct, frozen=True):
    """An address, as a chain backend takes it."""

    address: str
    funding_script: bytes

    def funding_address(self, network: Network) -> str:  # noqa: ARG002 - it was read for this network
        return self.address


def run(file: Path, addresses: Path | None, to: Path | None, publish: Path | None) -> None:
    """List coins, or broadcast; see the command."""
    try:
        if publish is not None:
            asyncio.run(_publish(file, bytes.fromhex(publish.read_text(encoding="ascii").strip())))
        elif addresses is not None:
            network = load_server_config(file).bitcoin_network
            lines = asyncio.run(_list(file, _payees(addresses, network)))
            if to is not None:
                _write(file, to, lines)
        else:
            fail("give a file of addresses, or --publish with the file of a transaction", status=2)
    except (SettingsError, StartError, Malformed, ValueError, OSError) as error:
        fail(str(error), status=2)
    except ChainFailed as error:
        fail(str(error))


def _payees(path: Path, network: Network) -> list[_Payee]:
    text = sys.stdin.read() if str(path) == "-" else path.read_text(encoding="ascii")
    return [
        _Payee(line, decode_address(line, network, "address")) for line in map(str.strip, text.splitlines()) if line
    ]


@asynccontextmanager
async def _chain(file: Path) -> AsyncIterator[Chain]:
    chain = await open_chain(load_server_config(file), str(file))
    try:
        yield chain
    finally:
        await chain.close()


async def _list(file: Path, payees: Sequence[_Payee]) -> list[str]:
    """Show the coins, and return a line for each."""
    async with _chain(file) as chain:
        found = await asyncio.gather(*(chain.funding(payee) for payee in payees))
        lines, rows, waiting = [], [], 0
        for payee, coin in ((payee, coin) for payee, coins in zip(payees, found, strict=True) for coin in coins):
            if not coin.usable_confirmations:
                waiting += 1
                continue
            raw = await chain.funding_transaction(coin.outpoint)
            lines.append(f"{coin.outpoint} {raw.hex()}\n")
            rows.append((str(coin.outpoint), payee.address, f"{coin.value_sat:,}", f"{coin.confirmations:,}"))
    if rows:
        numbers = [Column(name, is_number=True) for name in ("sat", "confirmations")]
        show_table([Column("coin (txid:vout)"), Column("address"), *numbers], rows)
    total_sat = sum(coin.value_sat for coins in found for coin in coins if coin.usable_confirmations)
    warn(f"{len(lines):,} coins of {total_sat:,} sat on {len(payees):,} addresses; {waiting:,} wait for a block")
    return lines


def _write(file: Path, to: Path, lines: Sequence[str]) -> None:
    to.write_text("".join(lines), encoding="ascii")
    named = f"{quoted(file.parent)} ADDRESS --fee-rate SAT_PER_VB --coins {quoted(to)} --out sweep.txt"
    warn(f"Next: `paychan-signer sweep {named}`")


async def _publish(file: Path, transaction: bytes) -> None:
    async with _chain(file) as chain:
        await chain.publish(transaction)
    say(f"Broadcast {CTransaction.deserialize(transaction).GetTxid()[::-1].hex()}")
