"""`paychan-signer rotate`: changes the seed or the destination while channels of the old ones are still open."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import tomlkit
import typer
from tomlkit.exceptions import TOMLKitError

from paychan.protocol.address import encode_address
from paychan.protocol.errors import Malformed
from paychan.protocol.keytree import HARDENED
from paychan.protocol.settings import SettingsError
from paychan.protocol.types import Network
from paychan.shared.leveldb_files import sync_directory
from signer.cli import words as backup
from signer.cli.options import (
    CommandFailed,
    ConfigFile,
    PassphraseDescriptor,
    PassphraseFile,
    WordsFile,
    examples,
    or_exit,
)
from signer.cli.terminal import next_command, say
from signer.config import SignerConfig, load_signer_config
from signer.keys.payout import Wallet, is_change, parse_payout
from signer.keys.ring import RESERVE_PATH
from signer.seed.encryption import CHOSEN
from signer.seed.file import change_seeds, draw_seed, read_seeds
from signer.seed.open import config_with_seed, now, passphrase_of, passphrase_sources

SEED = "seed"
"""The place that stands for addresses of the signer's own seed, in any case; the configuration has "" for it."""

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Change the seed or the destination; open channels keep the old ones until they end.",
)


@app.command(
    "seed",
    epilog=examples(
        "rotate seed config/live/signer.toml", "rotate seed config/live/signer.toml --words-file /media/usb/words-2"
    ),
)
def rotate_seed(
    file: ConfigFile,
    words_file: WordsFile = None,
    passphrase_fd: PassphraseDescriptor = None,
    passphrase_file: PassphraseFile = None,
) -> None:
    """Create a new seed for channels that are opened after the next start. Open channels are settled with the old keys.

    The old seed stays in the file; keep its words, too.
    It is needed until the last channel that was opened with it has ended: `paychan channels list` shows expiries.
    Then remove it with `paychan-signer forget`.
    """

    def run() -> None:
        config = config_with_seed(file)
        backup.require_terminal(words_file)
        with passphrase_of(config, passphrase_sources(config, passphrase_fd, passphrase_file)) as secret:
            old = read_seeds(config.seed_path, secret)[0]
            seed = draw_seed(now())
            with backup.handed_out(seed, words_file):
                change_seeds(config.seed_path, secret, CHOSEN, lambda seeds: (seed, *seeds))
        say(f"{config.seed_path} holds a new seed, {seed.fingerprint}, and the old seed, {old.fingerprint}.")
        say("It is used for new channels from the signer's next start on. Keep the words of both:")
        say(f"{old.fingerprint} is needed until the last channel opened before that start has ended:")
        say(
            f"`paychan channels list FILE` shows when each expires; then `paychan-signer forget FILE {old.fingerprint}`."
        )
        path = "/".join(f"{index & ~HARDENED}'" for index in RESERVE_PATH)
        say(
            f"The reserve has a new address from then on. Coins at its old address need the key m/{path} of the old seed."
        )

        say(
            f"The server's identity key is another from then on; {old.fingerprint} no longer certifies keys for receipts."
        )

    or_exit(file, run)


@app.command(
    "destination",
    epilog=examples(
        "rotate destination config/live/signer.toml 1M8iwBs5XD7ZJQJCDC7BdLEpSivRQZJ2Hg",
        "rotate destination config/live/signer.toml seed",
    ),
)
def rotate_destination(
    file: ConfigFile,
    place: Annotated[
        str,
        typer.Argument(
            metavar="PLACE",
            help='receives all settlements: an address, a descriptor of your own wallet, or "seed" for derived addresses',
            show_default=False,
        ),
    ],
) -> None:
    """Write another destination to the configuration. The old one moves to settlement.previous_addresses.

    A settlement that was signed for the old one may be signed again for it, for instance after a lost reply; no new
    settlement pays to it. Comments in the file stay.
    """

    def run() -> None:
        config = load_signer_config(file)
        key = "settlement.destination_address"
        try:
            chosen = checked_place(place, config) if place else SEED
        except Malformed as error:
            raise SettingsError(str(file), key, str(error.fields["reason"])) from None
        address = "" if chosen == SEED else chosen
        if address == config.settlement.destination_address:
            raise SettingsError(str(file), key, "has this value already: nothing was changed")
        replace_config(file, with_destination(file.read_text(encoding="utf8"), address))
        say(f"{file}: {key} is now {address or 'derived from the seed'}.")
        say_first_address(chosen, config)
        if config.settlement.destination_address:
            say(f"{config.settlement.destination_address} is in settlement.previous_addresses.")
        say(
            "Settlements that were signed before still pay to the earlier place, and those to addresses of the seed stay there."
        )
        say(
            "`paychan-signer earnings FILE` lists them, and `sweep` spends those of the seed, whatever the destination is now."
        )
        say("Takes effect at the signer's next start.", "bold")
        next_command("FILE")

    or_exit(file, run)


def checked_place(text: str, config: SignerConfig) -> str:
    """Check a place that the operator names; return `SEED`, or the address or descriptor without spaces around it.

    Raises:
        Malformed: none of these, or a wallet's addresses for change. The reason never repeats the text, which may be a
            private key.
    """
    text = text.strip()
    if text.lower() == SEED:
        return SEED
    try:
        parse_payout(text, Network(config.network))
    except Malformed as error:
        if "(" in text:
            raise
        places = 'a place is an address, a descriptor such as wpkh(xpub…/0/*), or "seed" for addresses of the seed'
        raise Malformed(field="destination", reason=f"{error.fields['reason']}; {places}") from None
    if is_change(text):
        reason = "a wallet's addresses for change end in /1/*: give the descriptor of its receiving addresses, /0/*"
        raise Malformed(field="destination", reason=reason)
    return text


def first_address(chosen: str, config: SignerConfig) -> str:
    """Return the first receiving address of a wallet; "" if the place is no wallet."""
    network = Network(config.network)
    payout = None if chosen == SEED else parse_payout(chosen, network)
    return encode_address(payout.at(0), network) if isinstance(payout, Wallet) else ""


def say_first_address(chosen: str, config: SignerConfig) -> None:
    """Show the first address of a wallet, for comparison."""
    if first := first_address(chosen, config):
        say(f"Its first receiving address is {first}: compare it with the one that your wallet shows.")


def with_destination(text: str, address: str) -> str:
    """Change the two settings in a TOML text, and nothing else."""
    document = tomlkit.parse(text.removeprefix("\ufeff"))
    settlement = document.setdefault("settlement", tomlkit.table())
    old = str(settlement.get("destination_address", ""))
    settlement["destination_address"] = address
    previous = settlement.setdefault("previous_addresses", tomlkit.array())
    if old and old not in previous:
        previous.append(old)
    if address in previous:
        previous.remove(address)
    return tomlkit.dumps(document)


def replace_config(file: Path, text: str) -> None:
    """Replace the configuration by a text, if that is a valid one. Owner and mode stay."""
    real = file.resolve()
    new = real.with_name(real.name + ".new")
    try:
        status = real.stat()
        new.write_text(text, encoding="utf8")
        new.chmod(status.st_mode & 0o7777)
        os.chown(new, status.st_uid, status.st_gid)
        load_signer_config(new)
        with new.open("rb") as written:
            os.fsync(written.fileno())
        new.replace(real)
        sync_directory(real.parent)
    except SettingsError as error:
        new.unlink()
        raise SettingsError(str(file), error.key, error.reason) from None
    except (OSError, TOMLKitError) as error:
        lines = "\n".join(line for line in text.splitlines() if "_address" in line)
        msg = f"{file} can't be written ({error}). Put this into its section [settlement]:\n{lines}"
        raise CommandFailed(msg) from None
