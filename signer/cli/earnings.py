"""`paychan-signer earnings` and `sweep`: what settlements paid to addresses of this signer's keys, and spending it.

Both are commands of the operator; a sweep takes the seed's passphrase. The signer's socket has no such request, so a server that was
taken over can't use them.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from paychan.protocol.address import decode_address, encode_address
from paychan.protocol.errors import Malformed
from paychan.protocol.settings import SettingsError
from paychan.protocol.settlement import Settlement
from paychan.protocol.types import Network, OutPoint
from paychan.shared.called import quoted
from paychan.shared.encoding import write_out
from paychan.shared.layout import Column
from paychan.shared.wording import clock
from signer.cli.options import (
    CommandFailed,
    ConfigFile,
    PassphraseDescriptor,
    PassphraseFile,
    agreed,
    examples,
    on_terminal,
    or_exit,
)
from signer.cli.sweeping import Place, Sweep, is_swept, keys_of, places, plan, read_coins, read_sweeps
from signer.cli.terminal import err, next_command, say, show_table
from signer.config import SignerConfig, load_signer_config
from signer.keys.payout import Payout
from signer.keys.ring import KeysFailed, KeySource
from signer.ledger.base import LedgerFailed
from signer.ledger.signed import Signed, signed_settlements
from signer.secret.file import PrivateFileError, append_line, write_new
from signer.seed.open import (
    config_with_seed,
    existing_seeds,
    now,
    passphrase_sources,
    refuse_another_token,
    refuse_new_token_keys,
    trees,
)
from signer.token.client import RemoteToken
from signer.token.derived_keys import generations
from signer.token.sessions import TokenError


def register(app: typer.Typer) -> None:
    """Add the commands."""
    file = "config/live/signer.toml"
    app.command(epilog=examples(f"earnings {file}", f"earnings {file} --addresses > addresses.txt"))(earnings)
    app.command(epilog=examples(f"sweep {file} ADDRESS --fee-rate 5 --coins coins.txt --out sweep.txt"))(sweep)


def earnings(
    file: ConfigFile,
    addresses: Annotated[
        bool, typer.Option("--addresses", help="print the addresses alone, for `paychan coins`", show_default=False)
    ] = False,
) -> None:
    """List the addresses that settlements pay to, from the signer's ledger; the signer may run, no passphrase is needed.

    `paychan coins` finds which coins are on them now; `sweep` spends those on addresses that the signer derived.
    """

    def run() -> None:
        config = load_signer_config(file)
        found = places(_signed(config), _payouts(config))
        if addresses:
            for place in found:
                if place.kind != "configured":
                    write_out(encode_address(place.script, Network(config.network)) + "\n")
            return
        _show(found, config, file)

    or_exit(file, run)


def sweep(
    file: ConfigFile,
    address: Annotated[
        str, typer.Argument(metavar="ADDRESS", help="receives all coins, less the fee", show_default=False)
    ],
    fee_rate: Annotated[int, typer.Option("--fee-rate", metavar="N", help="sat/vB", min=1, show_default=False)],
    coins: Annotated[
        Path,
        typer.Option(
            "--coins", metavar="PATH", help="lines TXID:VOUT TRANSACTION, from `paychan coins`", show_default=False
        ),
    ],
    out_file: Annotated[
        Path | None, typer.Option("--out", metavar="PATH", help="write the transaction to this new file")
    ] = None,
    reserve: Annotated[
        bool, typer.Option("--reserve", help="also spend coins of the reserve", show_default=False)
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="sign without a question", show_default=False)] = False,
    passphrase_fd: PassphraseDescriptor = None,
    passphrase_file: PassphraseFile = None,
) -> None:
    """Spend earnings on addresses that the signer derived. Shows what it signs and asks; broadcasts nothing.

    `paychan coins SERVER.toml --publish PATH` or `bitcoin-cli sendrawtransaction` broadcasts it.
    """

    def run() -> None:
        config = load_signer_config(file)
        script = _script(address, config)
        signed = _signed(config) if config.ledger_path.exists() else []
        listed = read_coins(_text(coins), signed)
        channels = {channel for place in places(signed, _payouts(config)) for channel in place.channels}
        channels.update(channel for each in listed for channel in each.channels)
        if not yes and not on_terminal():
            msg = "there is no terminal to ask on: --yes signs without a question"
            raise CommandFailed(msg)
        with _sources(file, config, passphrase_fd, passphrase_file) as sources:
            keys = keys_of(channels, sources, reserve=reserve)
            chosen = plan(listed, keys, script, fee_rate)
            _show_sweep(chosen, address, len(listed))
            if not yes and not agreed("Sign this?"):
                msg = "nothing was signed"
                raise CommandFailed(msg)
            transaction = asyncio.run(chosen.sign())
        _note(chosen, transaction, address, config)
        if out_file is None:
            write_out(transaction.transaction.hex() + "\n")
            return
        write_new(out_file, transaction.transaction.hex().encode() + b"\n")
        say(f"Wrote {out_file}, txid {transaction.txid[::-1].hex()}.")
        say("Any node broadcasts it: `bitcoin-cli sendrawtransaction`, or that of the server:")
        next_command("coins", file.parent, "--publish", out_file, program="paychan")

    or_exit(file, lambda: _with_sentences(file, run))


def _with_sentences(file: Path, run: Callable[[], None]) -> None:
    try:
        run()
    except (KeysFailed, TokenError) as error:
        raise SettingsError(str(file), "pkcs11.token", str(error)) from None


def _signed(config: SignerConfig) -> list[Signed]:
    try:
        return list(signed_settlements(config.ledger_path))
    except LedgerFailed as error:
        raise CommandFailed(str(error)) from None


def _payouts(config: SignerConfig) -> list[Payout]:
    return [*([config.payout] if config.payout else []), *config.previous_payouts]


@contextmanager
def _sources(
    file: Path, config: SignerConfig, passphrase_fd: int | None, passphrase_file: Path | None
) -> Iterator[Sequence[KeySource]]:
    """Open the keys: of the seed, or of the token, where only the reserve has keys that a sweep needs."""
    if config.key.mode == "debug":
        raise SettingsError(str(file), "key.mode", '"debug" has no earnings: nothing is on a chain')
    if config.key.mode == "pkcs11":
        with closing(RemoteToken(config)) as token:
            token.open()
            refuse_new_token_keys(config, token)
            refuse_another_token(config, token)
            yield [*generations(token, config.pkcs11)]
        return
    config_with_seed(file)
    yield trees(config, existing_seeds(config, passphrase_sources(config, passphrase_fd, passphrase_file)))


def _script(address: str, config: SignerConfig) -> bytes:
    try:
        return decode_address(address, Network(config.network))
    except Malformed as error:
        msg = f"ADDRESS: {address}: {error.fields['reason']}"
        raise CommandFailed(msg) from None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError) as error:
        msg = f"--coins {path} can't be read: {error}"
        raise CommandFailed(msg) from None


def _show(found: Sequence[Place], config: SignerConfig, file: Path) -> None:
    swept = read_sweeps(config.sweeps_path)
    if not found:
        say("No settlement was signed yet.")
        return
    columns = (
        Column("address"),
        Column("key"),
        Column("channels", is_number=True),
        Column("received sat", is_number=True),
        Column("now"),
    )
    names = {"derived": "of the seed", "reserve": "of the reserve", "configured": "yours, configured"}
    rows = [
        (
            encode_address(place.script, Network(config.network)),
            names[place.kind],
            f"{len(place.channels):,}",
            f"{place.most_sat:,}",
            _now(place, swept),
        )
        for place in found
    ]
    show_table(columns, rows)
    say("Received: what the settlements that this signer signed pay there. One that never confirmed paid nothing.")
    if swept:
        say("Swept: a signed sweep spends it. The sweep counts once it is broadcast and confirmed.")
    if any(place.kind != "configured" and not is_swept(place, swept) for place in found):
        say(
            f"Then `paychan coins {quoted(file.parent)} addresses.txt --out coins.txt` finds the coins that are there now."
        )
        next_command("earnings", "FILE", "--addresses", then=" > addresses.txt")


def _now(place: Place, swept: Mapping[OutPoint, str]) -> str:
    """Say what was swept; only the chain shows whether coins are there."""
    if place.kind == "configured":
        return "in your wallet"
    by = sorted({swept[coin] for coin in place.coins if coin in swept})
    if not by:
        return "not swept"
    return f"{'all' if is_swept(place, swept) else 'partly'} swept, by {' '.join(by)}"


def _show_sweep(sweep: Sweep, address: str, listed: int) -> None:
    for coin, _ in sweep.coins:
        err.print(f"  spends  {coin.outpoint}  {coin.value_sat:,} sat", soft_wrap=True)
    if listed > len(sweep.coins):
        err.print(f"  leaves  {listed - len(sweep.coins)} coins: too many for one transaction, or not of these keys")
    pays_sat = sweep.value_sat - sweep.fee_sat
    err.print(f"  pays    {escape(address)}  {pays_sat:,} sat", soft_wrap=True)
    err.print(f"  fee     {sweep.fee_sat:,} sat for at most {sweep.size:,} vB; all signatures are SIGHASH_ALL")


def _note(sweep: Sweep, signed: Settlement, address: str, config: SignerConfig) -> None:
    """Keep a line about a signed sweep. A failure is said, and the sweep goes on: the coins are the operator's."""
    txid = signed.txid[::-1].hex()
    about = {
        "at": clock(now()),
        "txid": txid,
        "spends": [str(coin.outpoint) for coin, _ in sweep.coins],
        "pays": address,
        "pays_sat": sweep.value_sat - sweep.fee_sat,
        "fee_sat": sweep.fee_sat,
    }
    try:
        append_line(config.sweeps_path, json.dumps(about).encode())
    except PrivateFileError as error:
        err.print(f"  signed  {txid}; no line about it was kept: {escape(str(error))}", soft_wrap=True)
        return
    err.print(f"  signed  {txid}; {escape(str(config.sweeps_path))} keeps a line about it", soft_wrap=True)
