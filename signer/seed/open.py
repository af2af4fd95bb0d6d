"""From the configuration to the seed's keys: gets the passphrase, opens the seed file, derives the trees."""

from __future__ import annotations

import os
import pwd
import secrets
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import assert_never

import structlog

from paychan.protocol.settings import SettingsError
from paychan.protocol.types import UnixTime
from signer.config import SignerConfig, load_signer_config
from signer.keys.ring import KeySource, hardened_keys, rbpcp_v2_keys
from signer.secret.file import PrivateFileError, exclusively, replace_private, write_new
from signer.secret.sources import Secret, Sources, given_secret, read_secret
from signer.seed.encryption import CHOSEN, DRAWN
from signer.seed.file import Seed, SeedError, create_seeds, draw_seed, read_seeds, refuse_missing
from signer.token.client import RemoteToken
from signer.token.objects import KeyName
from signer.token.sessions import TokenError

_PASSPHRASE_BYTES = 32

_LABELS = ("reserve", "identity", "root", "channels")
"""Names of the keys in a token, see `token.keys`."""

log = structlog.get_logger()


def seed_sources(
    config: SignerConfig, descriptor: int | None = None, passphrase_file: Path | None = None
) -> list[KeySource]:
    """Open the seed file, or create one if the configuration allows it, and derive its trees.

    Raises:
        SeedError: the seed can't be used or created.
        NoSecret: there is no passphrase.
    """
    return trees(config, open_seeds(config, passphrase_sources(config, descriptor, passphrase_file)))


def trees(config: SignerConfig, seeds: tuple[Seed, ...]) -> list[KeySource]:
    """Derive the trees: those of `key.mode` first, and of each mode the newest first.

    Those of the other mode follow: words do not say which mode they were used with, and a switch loses no open channel.
    """
    masters = [seed.master for seed in seeds]
    return [grow(master) for grow in _ways(config) for master in masters]


def _ways(config: SignerConfig) -> tuple[Callable[[bytes], KeySource], ...]:
    match config.key.mode:
        case "hardened":
            return hardened_keys, rbpcp_v2_keys
        case "rbpcp-v2":
            return rbpcp_v2_keys, hardened_keys
        case "debug" | "pkcs11":
            msg = f"{config.key.mode} grows no keys from a seed"
            raise ValueError(msg)
        case _:
            assert_never(config.key.mode)


def config_with_seed(file: Path) -> SignerConfig:
    """Read a configuration whose keys are derived from a seed, for a command on the seed.

    Raises:
        SettingsError: no usable configuration, a key mode without a seed, or the seed belongs to another user.
    """
    config = load_signer_config(file)
    if config.key.mode in ("debug", "pkcs11"):
        raise SettingsError(str(file), "key.mode", f'"{config.key.mode}" has no seed')
    user = config.isolation.user
    if user and user != pwd.getpwuid(os.geteuid()).pw_name:
        raise SettingsError(str(file), "isolation.user", f"the seed is {user}'s: `sudo -u {user} paychan-signer …`")
    return config


def now() -> UnixTime:
    return UnixTime(int(time.time()))


def passphrase_sources(
    config: SignerConfig, descriptor: int | None = None, passphrase_file: Path | None = None
) -> Sources:
    """All sources that may hold the passphrase of a configuration's seed."""
    return Sources(
        "passphrase",
        str(config.seed_path),
        "key.passphrase_file",
        config.key.passphrase_file,
        descriptor,
        passphrase_file,
        beside=beside(config.seed_path),
    )


def beside(seed_path: Path) -> Path:
    """Path of a passphrase that was created together with its seed: `signer.passphrase` for `signer.seed`."""
    return seed_path.with_suffix(".passphrase")


def open_seeds(config: SignerConfig, sources: Sources) -> tuple[Seed, ...]:
    """Return all generations, the newest first. Raises `SeedError`, `NoSecret`."""
    if config.key.create_if_missing and not os.path.lexists(config.seed_path):
        refuse_new_keys(config)
        return (_create_unasked(config.seed_path, sources),)
    return existing_seeds(config, sources)


def refuse_new_keys(config: SignerConfig) -> None:
    """Refuse to create a seed if a signer ran here before: the keys of its channels would be lost.

    Raises:
        SeedError: there is a ledger or an audit log; the text says how to mend it.
    """
    if config.traces:
        msg = (
            f"there is no {config.seed_path}, but {config.traces[0]} of a signer that had one: restore the seed file, or "
            "make it from its words with `paychan-signer recover FILE`. Another seed would lose the keys of open channels. "
            f"For a new signer, move {config.state_dir} away"
        )
        raise SeedError(msg)


def refuse_new_token_keys(config: SignerConfig, token: RemoteToken) -> None:
    """Refuse to make keys in an empty token if a signer ran here before: it used another token.

    Raises:
        TokenError: there is a ledger or an audit log; the text says how to mend it.
    """
    if config.traces and not token.has_keys:
        reason = (
            f"it holds no key of a signer, but there is {config.traces[0]} of one that had keys: connect that token again. "
            f"For a new signer, move {config.state_dir} away"
        )
        raise TokenError(key="pkcs11.token", reason=reason)


def refuse_another_token(config: SignerConfig, token: RemoteToken) -> None:
    """Refuse a token that lacks keys of open channels, such as an older copy of the token.

    Raises:
        TokenError: the missing key; the text says how to mend it.
    """
    for label, digest in _noted(config).items():
        key = token.find(KeyName.single(label.encode()))
        if key is None or _key_digest(key.public_key) != digest:
            reason = (
                f"it {'lacks the' if key is None else 'has another'} key {label!r}; {config.token_keys_path} records the "
                "right one: connect that token again. For a new signer, without open channels, remove that file"
            )
            raise TokenError(key="pkcs11.token", reason=reason)


def note_token_keys(config: SignerConfig, token: RemoteToken) -> None:
    """Record which keys the token holds. A full disk does not stop the start; the next start records them.

    Raises:
        TokenError: the earlier record can't be read.
    """
    found = {label: token.find(KeyName.single(label.encode())) for label in _LABELS}
    noted = {label: _key_digest(key.public_key) for label, key in found.items() if key is not None}
    if noted == _noted(config):
        return
    content = "".join(f"{label} {digest}\n" for label, digest in noted.items()).encode()
    try:
        with exclusively(config.token_keys_path):
            replace_private(config.token_keys_path, content)
    except PrivateFileError as error:
        log.warning("the token's keys could not be recorded", reason=str(error))


def _noted(config: SignerConfig) -> dict[str, str]:
    """Return the recorded digests by label. Raises `TokenError`."""
    try:
        text = config.token_keys_path.read_text(encoding="ascii")
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise TokenError(key="state_dir", reason=f"{config.token_keys_path} can't be read: {error}") from None
    return dict(line.split(" ", 1) for line in text.splitlines() if line.count(" ") == 1)


def _key_digest(public_key: bytes) -> str:
    """Return the digest that identifies a key. The root's public key itself would link channels to this signer."""
    return sha256(b"paychan token key " + public_key).hexdigest()


def existing_seeds(config: SignerConfig, sources: Sources) -> tuple[Seed, ...]:
    """Return all generations, the newest first, and create none. Raises `SeedError`, `NoSecret`."""
    with passphrase_of(config, sources) as passphrase:
        return read_seeds(config.seed_path, passphrase)


def passphrase_of(config: SignerConfig, sources: Sources) -> Secret:
    """Get the passphrase of a seed file that exists. Raises `SeedError`, `NoSecret`."""
    refuse_missing(config.seed_path)
    return read_secret(sources)


def _create_unasked(path: Path, sources: Sources) -> Seed:
    """Create a seed without a dialogue and without showing words: for a network without money."""
    given = given_secret(sources)
    with given or _draw_passphrase(beside(path)) as passphrase:
        seed = draw_seed(now())
        create_seeds(path, [seed], passphrase, CHOSEN if given else DRAWN)
    log.warning(
        "new seed created without words: keep a copy of the file and of its passphrase",
        file=str(path),
        passphrase="as configured" if given else str(beside(path)),
    )
    return seed


def _draw_passphrase(path: Path) -> Secret:
    secret = Secret(bytearray(secrets.token_hex(_PASSPHRASE_BYTES).encode()))
    try:
        write_new(path, secret.value + b"\n")
    except PrivateFileError as error:
        raise SeedError(str(error)) from None
    return secret
