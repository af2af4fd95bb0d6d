"""A wallet's backup: one file with the seed, the records of all channels, and the sums spent; restoring and checking it.

The words of the seed alone give the keys. A refund also needs the channel's expiry, the server's key and the outpoint,
which no key leads to: they are in the channel's record, and so in the backup.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Literal

import msgspec
from msgspec import UNSET, Struct, UnsetType, field

from paychan.client.errors import (
    BackupExists,
    BackupNotWritten,
    DamagedBackup,
    DamagedFile,
    LaterFile,
    NoBackup,
    NoSeed,
    NotABackup,
    WalletError,
)
from paychan.client.files import write_private
from paychan.client.paying.account import Carried
from paychan.client.paying.spending import SpendingLog
from paychan.client.paying.walletbudget import NAME as BUDGET
from paychan.client.paying.walletbudget import WalletBudget, read_wallet_budget, write_wallet_budget
from paychan.client.record import ChannelRecord, State, check_record
from paychan.client.seed import SKIPPED_BY_RESTORE, Seed
from paychan.client.wallet import FORGOTTEN, ChannelFile, Wallet
from paychan.protocol.errors import PaychanError
from paychan.shared.wording import sat

_replace = msgspec.structs.replace

SUFFIX = ".wallet"
"""End of the name that a backup gets in a directory."""

_HEAD_BYTES = 300
"""Beginning of a file that tells a backup from other files: its first fields stand there."""

_LIFE = list(State)
"""States in the order of a channel's life."""


class Backup(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The content of a backup file."""

    format: Literal[1] = 1
    created_at: int
    """Unix time."""
    seed: Seed | None
    channels: tuple[ChannelRecord, ...]
    forgotten: tuple[ChannelRecord, ...] | UnsetType = UNSET
    """Channels off the list; a backup without any lacks the field, and so earlier versions can read it."""
    spending: Carried | UnsetType = UNSET
    """Sums of the spending log; a wallet that has paid for no request lacks the field."""
    budget: WalletBudget | UnsetType = UNSET
    """The wallet's own limits, if it has any."""
    sha256: str = ""
    """Hash of the JSON of all other fields: a changed digit of the seed would go unseen without it."""


class Chosen(Struct, frozen=True):
    """A backup that was read, and the files beside it that may be newer backups but can't be read."""

    path: Path
    backup: Backup
    skipped: Mapping[Path, WalletError] = field(default_factory=dict)


class Restored(Struct, frozen=True):
    """The result of a restore: names of channels."""

    written: tuple[str, ...]
    kept: tuple[str, ...]
    """The wallet had the channel already, as new as the backup has it or newer."""
    forgotten: tuple[str, ...]
    """Written to the directory `forgotten`."""
    replaced: tuple[str, ...]
    """The wallet's file was damaged or older; the old file is beside the new one, as `NAME.json.old`."""


class Finding(Struct, frozen=True):
    """A problem that a check found; `name` is a channel's, or "" for the wallet."""

    name: str
    text: str
    is_note: bool = False
    """Nothing has to be done about it."""


def take_backup(wallet: Wallet, now: int) -> tuple[Backup, dict[str, WalletError]]:
    """Read the whole wallet; return its backup, and the errors of channels that can't be read, by name.

    Channels in use are read as well: a record on disk always covers every payment that was sent.

    Raises:
        DamagedFile, LaterFile, LooseMode, UnreadableFile: the seed can't be read.
    """
    try:
        seed = wallet.seed.read()
    except NoSeed:
        seed = None
    records, problems = wallet.read_all()
    forgotten, more = _forgotten(wallet)
    kept = tuple(forgotten) or UNSET
    taken = Backup(created_at=now, seed=seed, channels=tuple(records), forgotten=kept)
    try:
        taken = _replace(taken, budget=read_wallet_budget(wallet.directory) or UNSET)
    except WalletError as error:
        more[BUDGET] = error
    log = SpendingLog(wallet.directory)
    try:
        taken = _replace(taken, spending=log.account().carried(now) if log.path.exists() else UNSET)
    except WalletError as error:
        more[log.path.name] = error
    return _sealed(taken), problems | more


def write_backup(backup: Backup, path: Path) -> None:
    """Write a new file, mode 0600, durably.

    Raises:
        BackupExists: there is such a file, which stays.
        BackupNotWritten: the system refuses to write it.
    """
    try:
        path.touch(0o600, exist_ok=False)
        write_private(path, msgspec.json.format(msgspec.json.encode(backup)) + b"\n")
    except FileExistsError:
        raise BackupExists(path=path) from None
    except OSError as error:
        raise BackupNotWritten(path=path, reason=error.strerror or error) from None


def newest_backup(path: Path) -> Chosen:
    """Read a file, or the newest backup in a directory: files are known by their content, whatever their names.

    Raises:
        NoBackup: the directory has none; or as `read_backup`, if none of them can be read.
    """
    if not path.is_dir():
        return Chosen(path, read_backup(path))
    found: list[Chosen] = []
    skipped: dict[Path, WalletError] = {}
    try:
        candidates = sorted(each for each in path.iterdir() if each.is_file())
    except OSError as error:
        raise NoBackup(path=path, reason=error.strerror or error) from None
    for each in candidates:
        try:
            found.append(Chosen(each, read_backup(each)))
        except NotABackup as error:
            if each.suffix == SUFFIX:
                skipped[each] = error
        except WalletError as error:
            skipped[each] = error
    if not found:
        reason = "no file in this directory is a backup of a wallet"
        raise next(iter(skipped.values()), NoBackup(path=path, reason=reason))
    newest = max(found, key=lambda each: (each.backup.created_at, each.path))
    return Chosen(newest.path, newest.backup, skipped)


def read_backup(path: Path) -> Backup:
    """Read a backup.

    Raises:
        NotABackup: another kind of file.
        DamagedBackup: changed since it was written.
        LaterFile: of a later version.
        NoBackup: the system refuses to read it.
    """
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
            if not (b'"created_at"' in head and b'"seed"' in head and head.lstrip().startswith(b"{")):
                raise NotABackup(path=path)
            raw = head + file.read()
    except OSError as error:
        raise NoBackup(path=path, reason=error.strerror or error) from None
    try:
        backup = msgspec.json.decode(raw, type=Backup)
        for record in (*backup.channels, *(backup.forgotten or ())):
            check_record(record)
    except (msgspec.MsgspecError, PaychanError, ValueError, RecursionError) as error:
        later = "unknown field" in str(error) or str(error).endswith("at `$.format`")
        raise (LaterFile if later else DamagedBackup)(path=path, reason=error) from None
    if _sealed(backup) != backup:
        raise DamagedBackup(path=path, reason="its checksum is wrong")
    return backup


def restore(wallet: Wallet, backup: Backup) -> Restored:
    """Write what the wallet lacks; a channel that the wallet knows better stays as it is.

    New keys leave out those that may have been used after the backup. Sums of the spending log never become smaller, and
    limits that the wallet has stay.

    Raises:
        OtherSeed: the wallet has another seed; nothing was written.
        ChannelInUse: another program uses a channel that would be replaced.
        DamagedFile, LaterFile, LooseMode, UnreadableFile: the wallet's seed can't be read; nothing was written.
    """
    if backup.seed is not None:
        restore_seed(wallet, _replace(backup.seed, next_index=backup.seed.next_index + SKIPPED_BY_RESTORE))
    done: dict[str, list[str]] = {"written": [], "kept": [], "forgotten": [], "replaced": []}
    names = {_identity(record): record.name for record in wallet.read_all()[0]}
    for record in backup.channels:
        name, what = _restore_channel(wallet, _replace(record, name=names.get(_identity(record), record.name)))
        done[what].append(name)
    gone = [record for record in backup.forgotten or () if _identity(record) not in names]
    if gone:
        place = Wallet(wallet.directory / FORGOTTEN)
        there = {_identity(record): record.name for record in place.read_all()[0]}
        for record in gone:
            name, what = _restore_channel(place, _replace(record, name=there.get(_identity(record), record.name)))
            if what != "kept":
                done["forgotten"].append(name)
    if backup.budget and not read_wallet_budget(wallet.directory):
        write_wallet_budget(wallet.directory, backup.budget)
    if backup.spending:
        SpendingLog(wallet.directory).take_over(backup.spending)
    return Restored(*(tuple(done[what]) for what in ("written", "kept", "forgotten", "replaced")))


def restore_seed(wallet: Wallet, seed: Seed) -> None:
    """Store a seed; a wallet that has the same one keeps the index of its next key. Raises as `SeedFile.put`."""
    try:
        index = wallet.seed.read().next_index
    except NoSeed:
        index = seed.next_index
    wallet.seed.put(_replace(seed, next_index=index))


def check(wallet: Wallet, backup: Backup | None = None) -> list[Finding]:
    """Look for problems: files that can't be read, keys that the words don't give, and differences from a backup.

    Forgotten channels are looked at as well: their files hold keys.
    """
    records, problems = wallet.read_all()
    forgotten, more = _forgotten(wallet)
    problems |= more
    found = [Finding(name, str(error)) for name, error in problems.items()]
    try:
        seed = wallet.seed.read()
    except NoSeed as error:
        found += [Finding("", str(error))] if any(record.key_index is not None for record in records) else []
        seed = None
    except WalletError as error:
        found.append(Finding("", str(error)))
        seed = None
    kept = [*records, *forgotten]
    found += [Finding(record.name, text) for record in kept if (text := _key_problem(record, seed))]
    if backup is not None:
        found += _differences(kept, seed, backup)
        found += _only_saved(wallet, kept, problems, backup)
    return found


def without_words(records: Sequence[ChannelRecord]) -> list[str]:
    """Return the channels with coins whose keys no words give: only files hold them."""
    return [record.name for record in records if record.key_index is None and not record.ended]


def _key_problem(record: ChannelRecord, seed: Seed | None) -> str:
    if record.key_index is None:
        return ""
    if seed is None or record.key_index >= seed.next_index:
        return (
            ""
            if seed is None
            else f"its key has the index {record.key_index}, and the seed goes on at {seed.next_index}"
        )
    derived = seed.key(record.key_index).to_hex()
    return "" if derived == record.private_key else "its key is not that of this wallet's words"


def _differences(records: Sequence[ChannelRecord], seed: Seed | None, backup: Backup) -> list[Finding]:
    found = []
    if seed is not None and (backup.seed is None or backup.seed.entropy != seed.entropy):
        found.append(Finding("", "the backup has another seed, or none"))
    saved = {_identity(record): record for record in (*(backup.forgotten or ()), *backup.channels)}
    for record in records:
        old = saved.get(_identity(record))
        if old is None:
            found.append(Finding(record.name, "in the wallet, not in the backup"))
        elif _newer(record, old):
            found.append(_older(record, old))
        elif _newer(old, record):
            found.append(
                Finding(record.name, "the wallet is older than the backup, which knows a later payment or state")
            )
    return found


def _only_saved(
    wallet: Wallet, records: Sequence[ChannelRecord], problems: Mapping[str, WalletError], backup: Backup
) -> list[Finding]:
    """Find what only the backup has; a channel whose file can't be read is a finding already."""
    there = {_identity(record) for record in records}
    saved = (*backup.channels, *(backup.forgotten or ()))
    lost = [each for each in saved if _identity(each) not in there and each.name not in problems]
    found = [Finding(each.name, "in the backup, not in the wallet") for each in lost]
    if backup.seed is not None and not wallet.seed.path.exists():
        found.append(Finding("", "the seed is in the backup, not in the wallet"))
    return found


def _older(record: ChannelRecord, old: ChannelRecord) -> Finding:
    """Say what a backup lacks of a channel; it is a note if a restored channel gets that from the server by itself."""
    paid = sat(record.paid_sat - old.paid_sat)
    knows_coins = old.funding_outpoint == record.funding_outpoint and len(old.moves) == len(record.moves)
    if knows_coins and old.state is not State.NEW:
        text = f"{paid} were paid since the backup, or it closed: a restored channel takes that over from the server"
        return Finding(record.name, text, is_note=True)
    return Finding(
        record.name,
        f"the backup is older, and lacks where the coins are now; {paid} were paid since: make a new backup",
    )


def _forgotten(wallet: Wallet) -> tuple[list[ChannelRecord], dict[str, WalletError]]:
    """Read the channels that the payer took off the list; return also the errors of unreadable ones."""
    try:
        place = wallet.forgotten()
    except WalletError as error:
        return [], {FORGOTTEN: error}
    records, problems = ([], {}) if place is None else place.read_all()
    return records, {f"{FORGOTTEN}/{name}": error for name, error in problems.items()}


def _restore_channel(wallet: Wallet, record: ChannelRecord) -> tuple[str, str]:
    """Restore one channel; return its name, and the field of `Restored` that it belongs to."""
    name, number = record.name, 2
    while True:
        file = wallet.lock(name)
        try:
            what = _restore_as(wallet, file, _replace(record, name=name))
        finally:
            file.release()
        if what:
            return name, what
        name, number = f"{record.name}-{number}", number + 1


def _restore_as(wallet: Wallet, file: ChannelFile, record: ChannelRecord) -> str:
    """Restore a channel under its name; return "" if another channel has that name."""
    path = wallet.directory / f"{record.name}.json"
    if not path.exists():
        file.save(record)
        return "written"
    with contextlib.suppress(DamagedFile):
        there = wallet.read(record.name)
        if _identity(there) != _identity(record):
            return ""
        if not _newer(record, there):
            return "kept"
    path.replace(path.with_name(f"{path.name}.old"))
    file.save(record)
    return "replaced"


def _identity(record: ChannelRecord) -> tuple[str, str, int]:
    return record.private_key, record.server_key, record.expiry


def _newer(record: ChannelRecord, other: ChannelRecord) -> bool:
    """Say whether a record knows more than another one of the same channel."""
    mine, theirs = ((each.paid_sat, len(each.moves), _LIFE.index(each.state)) for each in (record, other))
    return mine > theirs


def _sealed(backup: Backup) -> Backup:
    return _replace(backup, sha256=sha256(msgspec.json.encode(_replace(backup, sha256=""))).hexdigest())
