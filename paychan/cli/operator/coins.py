"""Finds the unspent coins on addresses through the server's node, and broadcasts a transaction, for `paychan coins`."""

from __future__ import annotations

import asyncio
import struct
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from bitcoin.core import CTransaction
from bitcoin.core.serialize import SerializationError
from msgspec import Struct

from paychan.chain.base import Chain, ChainFailed
from paychan.chain.debug import DebugChain
from paychan.cli.terminal import fail, next_command, say, show_table, warn
from paychan.config import load_server_config
from paychan.parts import StartError, open_chain
from paychan.protocol.address import decode_address
from paychan.protocol.errors import Malformed
from paychan.protocol.settings import SettingsError
from paychan.protocol.types import Network, OutPoint
from paychan.shared.called import quoted
from paychan.shared.layout import Column

_LONGEST_TEXT = 8_100_000
"""A transaction of a whole block, 4,000,000 bytes (BIP141), has 8,000,000 hex digits."""


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
            asyncio.run(_publish(file, publish))
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


def _text(path: Path, wanted: str) -> str:
    """Return the text of a file; if it is none, end the command with a sentence that names the file."""
    try:
        with path.open(encoding="ascii") as file:
            text = file.read(_LONGEST_TEXT + 1)
    except OSError as error:
        fail(f"can't read {path}: {error.strerror}. It should hold {wanted}", status=2)
    except UnicodeDecodeError:
        fail(f"{path} is no text file. It should hold {wanted}", status=2)
    if len(text) > _LONGEST_TEXT:
        fail(f"{path} is too long. It should hold {wanted}", status=2)
    return text


def _transaction(path: Path) -> CTransaction:
    """Return the transaction in a file; if there is none, end the command with a sentence that names the file."""
    wanted = "one signed transaction in hex, as `paychan-signer sweep` writes it with --out"
    text = _text(path, wanted).strip()
    if not text:
        fail(f"{path} is empty. It should hold {wanted}", status=2)
    try:
        transaction = CTransaction.deserialize(bytes.fromhex(text))
    except (ValueError, SerializationError, struct.error):
        fail(f"{path} has no whole transaction. It should hold {wanted}", status=2)
    if not transaction.vin or not transaction.vout:
        fail(f"{path} has a transaction without inputs or outputs. It should hold {wanted}", status=2)
    return transaction


def _payees(path: Path, network: Network) -> list[_Payee]:
    text = sys.stdin.read() if str(path) == "-" else _text(path, "one address a line")
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
    coins, addresses = _counted(len(lines), "coin", "coins"), _counted(len(payees), "address", "addresses")
    later = f"{waiting:,} {'waits' if waiting == 1 else 'wait'} for a block"
    warn(f"{coins} of {total_sat:,} sat on {addresses}; {later}")
    return lines


def _counted(number: int, one: str, several: str) -> str:
    return f"{number:,} {one if number == 1 else several}"


def _write(file: Path, to: Path, lines: Sequence[str]) -> None:
    to.write_text("".join(lines), encoding="ascii")
    if not lines:
        return
    named = f"{quoted(file.parent)} ADDRESS --fee-rate SAT_PER_VB --coins {quoted(to)} --out sweep.txt"
    warn(f"To spend them, name your address and a fee rate: `paychan-signer sweep {named}`")


async def _publish(file: Path, path: Path) -> None:
    transaction = _transaction(path)
    txid = bytes(transaction.GetTxid())
    named = txid[::-1].hex()
    async with _chain(file) as chain:
        depth = None if isinstance(chain, DebugChain) else await _depth(chain, transaction)
        if depth is not None:
            where = "is confirmed already" if depth else "is in the mempool already, and waits for a block"
            say(f"{named} {where}: nothing was broadcast")
            return
        await chain.publish(transaction.serialize())
    say(f"Broadcast {named}. The same command shows later whether it is confirmed.")
    next_command("coins", "FILE", "--publish", path)


async def _depth(chain: Chain, transaction: CTransaction) -> int | None:
    """Return the confirmations of a transaction by its unspent outputs, 0 in the mempool; None if none is found."""
    outpoints = [OutPoint(bytes(transaction.GetTxid()), number) for number in range(len(transaction.vout))]
    try:
        found = await chain.unspent(outpoints)
    except ChainFailed:
        return None
    return max((coin.confirmations for coin in found.values()), default=None)
