"""Commands about the seed file: create it, recover it from words, verify the words, change its passphrase."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from paychan.shared.places import how_to_make
from signer.cli import earnings as earning
from signer.cli import pubkey as publickeys
from signer.cli import rotate as rotation
from signer.cli import words as backup
from signer.cli.destination import DestinationOption, choose_destination, say_destination, write_destination
from signer.cli.options import (
    BackupFile,
    CommandFailed,
    ConfigFile,
    PassphraseDescriptor,
    PassphraseFile,
    RawSeed,
    WordsFile,
    examples,
    or_exit,
)
from signer.cli.terminal import next_command, say
from signer.secret.sources import Sources, choose_secret
from signer.seed.encryption import CHOSEN
from signer.seed.file import (
    Seed,
    SeedError,
    change_seeds,
    create_seeds,
    draw_seed,
    encrypt_plain_seed,
    read_plain_seed,
    read_seeds,
)
from signer.seed.open import config_with_seed, existing_seeds, now, passphrase_of, passphrase_sources, refuse_new_keys

_NewDescriptor = Annotated[
    int | None,
    typer.Option("--new-passphrase-fd", metavar="N", help="read the new passphrase from this descriptor", min=0),
]
_NewFile = Annotated[
    Path | None,
    typer.Option("--new-passphrase-file", metavar="PATH", help="read the new passphrase from this file, mode 0600"),
]
_Older = Annotated[
    bool,
    typer.Option("--older", help="add it to the seed file as the oldest generation, for channels that are still open"),
]


def register(app: typer.Typer) -> None:
    """Add all commands about keys to the command line."""
    for command, lines in _COMMANDS.items():
        app.command(epilog=examples(*lines))(command)
    app.add_typer(rotation.app, name="rotate")
    publickeys.register(app)
    earning.register(app)


def init(
    file: ConfigFile,
    words_file: WordsFile = None,
    destination: DestinationOption = "",
    passphrase_fd: PassphraseDescriptor = None,
    passphrase_file: PassphraseFile = None,
) -> None:
    """Create the seed that a configuration names, and show it once as 24 words. An existing seed is left alone.

    Asks where the earnings go, unless the configuration or --destination says so. Three of the words must be typed again
    before the file is written.
    """

    def run() -> None:
        config = config_with_seed(file)
        _refuse_existing(config.seed_path)
        refuse_new_keys(config)
        backup.require_terminal(words_file)
        chosen = choose_destination(file, config, destination)
        _make_directory(config.seed_path.parent)
        sources = passphrase_sources(config, passphrase_fd, passphrase_file)
        with choose_secret(sources) as secret:
            seed = draw_seed(now())
            with backup.handed_out(seed, words_file):
                write_destination(file, config, chosen)
                create_seeds(config.seed_path, [seed], secret, CHOSEN)
        say(f"Created {config.seed_path}, encrypted; the fingerprint of its master key is {seed.fingerprint}.")
        say_destination(chosen, config)
        say("Try the backup first; `paychan-signer FILE` starts the signer then.")
        next_command("verify", "FILE")

    or_exit(file, run)


def recover(
    file: ConfigFile,
    words_file: BackupFile = None,
    raw: RawSeed = False,
    older: _Older = False,
    destination: DestinationOption = "",
    passphrase_fd: PassphraseDescriptor = None,
    passphrase_file: PassphraseFile = None,
) -> None:
    """Create the seed file from its backup: 12 to 24 words, without a BIP39 passphrase. An existing file is left alone.

    Asks on a terminal where the earnings go, unless the configuration or --destination says so. Without a terminal they go
    to addresses of the seed. After rotations there are several backups: recover the newest first, then the others, newest
    first, with --older.
    """

    def run() -> None:
        config = config_with_seed(file)
        sources = passphrase_sources(config, passphrase_fd, passphrase_file)
        if older:
            if destination:
                msg = "--older adds a seed and leaves the destination: `paychan-signer rotate destination FILE PLACE` changes it"
                raise CommandFailed(msg)
            with passphrase_of(config, sources) as secret:
                read_seeds(config.seed_path, secret)
                seed = backup.take_back(words_file, now(), raw=raw)
                change_seeds(config.seed_path, secret, CHOSEN, lambda seeds: (*_without(seed, seeds), seed))
            say(f"Added generation {seed.fingerprint} to {config.seed_path}. It is used from the next start on.")
            return
        _refuse_existing(config.seed_path)
        chosen = choose_destination(file, config, destination, otherwise=rotation.SEED)
        seed = backup.take_back(words_file, now(), raw=raw)
        with choose_secret(sources) as secret:
            write_destination(file, config, chosen)
            create_seeds(config.seed_path, [seed], secret, CHOSEN)
        say(f"Recovered {config.seed_path}, encrypted; the fingerprint of its master key is {seed.fingerprint}.")
        say_destination(chosen, config)
        say("If there are backups of older seeds, add each first: `paychan-signer recover FILE --older`.")
        next_command("FILE")

    or_exit(file, run)


def verify(
    file: ConfigFile,
    words_file: BackupFile = None,
    raw: RawSeed = False,
    passphrase_fd: PassphraseDescriptor = None,
    passphrase_file: PassphraseFile = None,
) -> None:
    """Compare a backup with each generation in the seed file. Status 0: it is the backup of one of them; 1: of none."""

    def run() -> None:
        config = config_with_seed(file)
        seeds = existing_seeds(config, passphrase_sources(config, passphrase_fd, passphrase_file))
        typed = backup.take_back(words_file, now(), raw=raw)
        for number, seed in enumerate(seeds):
            age = "newest" if number == 0 else f"{number} before"
            same = seed.master == typed.master
            say(f"{seed.fingerprint}  {age:9}  {'yes, this is its backup' if same else 'no'}", "green" if same else "")
        if typed.master not in {seed.master for seed in seeds}:
            say(f"This is the backup of {typed.fingerprint}, which {config.seed_path} does not hold.")
            raise typer.Exit(1)

    or_exit(file, run)


def encrypt(
    file: ConfigFile, passphrase_fd: PassphraseDescriptor = None, passphrase_file: PassphraseFile = None
) -> None:
    """Encrypt a seed file of an earlier release: 64 hex digits in plain text. All keys stay the same."""

    def run() -> None:
        config = config_with_seed(file)
        read_plain_seed(config.seed_path, now())
        with choose_secret(passphrase_sources(config, passphrase_fd, passphrase_file)) as secret:
            seed = encrypt_plain_seed(config.seed_path, secret, CHOSEN, now())
        say(f"Encrypted {config.seed_path}; the fingerprint of its master key is {seed.fingerprint}.")
        say("The plain text may still be in free blocks of the disk and in old copies: destroy those, or rotate.")
        say("A copy of the hex digits is still a backup: `paychan-signer recover FILE --hex` reads them.")

    or_exit(file, run)


def passphrase(
    file: ConfigFile,
    passphrase_fd: PassphraseDescriptor = None,
    passphrase_file: PassphraseFile = None,
    new_passphrase_fd: _NewDescriptor = None,
    new_passphrase_file: _NewFile = None,
) -> None:
    """Change the passphrase of the seed file."""

    def run() -> None:
        config = config_with_seed(file)
        old = passphrase_sources(config, passphrase_fd, passphrase_file)
        new = Sources(old.name, old.of, old.key, "", new_passphrase_fd, new_passphrase_file, replaces=True)
        with passphrase_of(config, old) as secret:
            read_seeds(config.seed_path, secret)
            with choose_secret(new) as chosen:
                change_seeds(config.seed_path, secret, CHOSEN, new_passphrase=chosen)
        say(f"{config.seed_path} has the new passphrase. Older copies of the file still open with the old one.")
        kept = config.key.passphrase_file or (str(old.beside) if old.beside and old.beside.exists() else "")
        if kept:
            say(f"Now write it to {kept}: the next start reads it from there.", "yellow")

    or_exit(file, run)


def forget(
    file: ConfigFile,
    fingerprint: Annotated[
        str, typer.Argument(metavar="FINGERPRINT", help="fingerprint of the generation", show_default=False)
    ],
    passphrase_fd: PassphraseDescriptor = None,
    passphrase_file: PassphraseFile = None,
) -> None:
    """Remove an old generation from the seed file, after all channels that were opened with it have ended.

    `paychan channels list` shows the open ones. Its words bring it back: `paychan-signer recover --older`.
    """

    def run() -> None:
        config = config_with_seed(file)
        with passphrase_of(config, passphrase_sources(config, passphrase_fd, passphrase_file)) as secret:
            change_seeds(config.seed_path, secret, CHOSEN, lambda seeds: _forgotten(seeds, fingerprint))
        say(f"Removed generation {fingerprint} from {config.seed_path}. This takes effect at the signer's next start.")

    or_exit(file, run)


def _make_directory(path: Path) -> None:
    """Make the seed's directory before the words are shown: they must not belong to a seed that can't be written."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        msg = f"can't make {path}: {error.strerror}. {how_to_make(path)}"
        raise CommandFailed(msg) from None


def _refuse_existing(path: Path) -> None:
    if os.path.lexists(path):
        msg = f"{path} exists already and was left alone: another seed would lose the keys of open channels"
        raise SeedError(msg)


def _without(seed: Seed, seeds: tuple[Seed, ...]) -> tuple[Seed, ...]:
    if seed.master in {each.master for each in seeds}:
        msg = f"generation {seed.fingerprint} is in the file already: nothing was changed"
        raise CommandFailed(msg)
    return seeds


def _forgotten(seeds: tuple[Seed, ...], fingerprint: str) -> list[Seed]:
    old = [seed.fingerprint for seed in seeds[1:]]
    if fingerprint not in old:
        msg = f"there is no old generation {fingerprint}: {', '.join(old) or 'the newest is the only one'}"
        raise CommandFailed(msg)
    return [seeds[0], *(seed for seed in seeds[1:] if seed.fingerprint != fingerprint)]


_FILE = "config/live/signer.toml"
_COMMANDS: dict[Callable[..., None], tuple[str, ...]] = {
    init: (
        f"init {_FILE}",
        f"init {_FILE} --passphrase-file /root/passphrase --words-file /media/usb/words --destination seed",
    ),
    recover: (
        f"recover {_FILE}",
        f"recover {_FILE} --older --words-file /media/usb/words",
        f"recover {_FILE} --hex < seed-file-of-an-earlier-release",
    ),
    verify: (f"verify {_FILE}", f"verify {_FILE} --words-file /media/usb/words"),
    encrypt: (f"encrypt {_FILE}",),
    passphrase: (f"passphrase {_FILE}", f"passphrase {_FILE} --new-passphrase-file /root/new-passphrase"),
    forget: (f"forget {_FILE} 73c5da0a",),
}
