"""A wallet's backup: it brings back every channel and every key, replaces nothing newer, and is checked before use."""

from __future__ import annotations

import json
import shutil
import signal
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from paychan.client import (
    BackupExists,
    BackupNotWritten,
    Channel,
    ChannelInUse,
    DamagedFile,
    LaterFile,
    NoBackup,
    OtherSeed,
    Payer,
    State,
)
from paychan.client.backup import (
    Backup,
    check,
    newest_backup,
    read_backup,
    restore,
    restore_seed,
    take_backup,
    without_words,
    write_backup,
)
from paychan.client.errors import NotABackup
from paychan.client.seed import SKIPPED_BY_RESTORE, seed_of_words
from paychan.client.wallet import Wallet
from paychan.protocol.keytree import payer_descriptor
from paychan.protocol.types import Network
from paychan.shared.words import to_seed
from tests.lib.pseudoterminal import PseudoTerminal
from tests.lib.signer_process import COMMAND
from tests.lib.system import System

PAYCHAN = Path(COMMAND).with_name("paychan")
NOW = 1_800_000_000
ABANDON = [*["abandon"] * 11, "about"]
DESCRIPTOR = (
    "pkh(tprv8cRSopCNi1pFYZ2vpQyMMEvnPTaCchxS2mqVHWtekY3o8L7apZHgbg3T1q18DipuGcP8QpoxqFv2YcudkfecUC9xMvUxAFCoYbpYmL4rWeh"
    "/*')#j24t4wwr"
)


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """Signer and server, with debug funding."""
    with System(tmp_path_factory.mktemp("system")) as running:
        yield running


@pytest.fixture
def payer(system: System, tmp_path: Path) -> Iterator[Payer]:
    with Payer(system.url, wallet=tmp_path / "wallet") as payer:
        yield payer


def opened(payer: Payer) -> Channel:
    channel = payer.new_channel(hours=100)
    channel.fund_debug()
    channel.open()
    return channel


def saved(wallet: Wallet, path: Path) -> Path:
    write_backup(take_backup(wallet, NOW)[0], path)
    return path


def run(*words: object, status: int = 0, wallet: Path) -> str:
    """Run `paychan wallet`."""
    command = [PAYCHAN, "wallet", *map(str, words), *(["--wallet", wallet] if wallet else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_fault_50_a_restored_wallet_pays_on(payer: Payer, tmp_path: Path) -> None:
    """After a loss of the directory, a backup brings back all channels; payments since are taken over from the server."""
    channels = [opened(payer), opened(payer)]
    saved(payer.wallet, tmp_path / "copy.wallet")
    for channel in channels:
        channel.pay(500)
    paid = {channel.name: channel.paid_sat for channel in channels}
    payer.close()
    shutil.rmtree(tmp_path / "wallet")

    there = Wallet(tmp_path / "wallet")
    done = restore(there, read_backup(tmp_path / "copy.wallet"))

    assert set(done.written) == set(paid)
    with Payer(payer.url, wallet=tmp_path / "wallet") as again:
        for name, total in paid.items():
            assert again.channel(name).pay(20).total_paid_sat == total + 20
        assert again.new_channel(hours=100).record.key_index == 2 + SKIPPED_BY_RESTORE
    assert check(there) == []


def test_fault_50_the_words_alone_give_every_key(payer: Payer, tmp_path: Path) -> None:
    """The words give the private key of each channel of the wallet, and never a key that was used before."""
    records = [opened(payer).record for _ in range(3)]
    words = payer.wallet.seed.read().words

    there = Wallet(tmp_path / "other")
    restore_seed(there, seed_of_words(words))

    seed = there.seed.read()
    assert [key.to_hex() for key in seed.keys(range(3))] == [record.private_key for record in records]
    assert there.seed.new_key()[1] == SKIPPED_BY_RESTORE


def test_a_restore_replaces_nothing_newer(payer: Payer, tmp_path: Path) -> None:
    """A channel that paid since the backup stays; a missing one is written; a damaged one is replaced and kept aside."""
    paid, lost, damaged = (opened(payer) for _ in range(3))
    backup = read_backup(saved(payer.wallet, tmp_path / "copy.wallet"))
    paid.pay(5)
    newest = paid.record
    payer.close()
    (payer.wallet.directory / f"{lost.name}.json").unlink()
    (payer.wallet.directory / f"{damaged.name}.json").write_text("{")

    done = restore(payer.wallet, backup)

    assert (done.kept, done.written, done.replaced) == ((paid.name,), (lost.name,), (damaged.name,))
    assert payer.wallet.read(paid.name) == newest
    assert (payer.wallet.directory / f"{damaged.name}.json.old").read_text() == "{"
    assert payer.wallet.seed.read().next_index == 3
    assert restore(payer.wallet, backup).kept == tuple(record.name for record in backup.channels)


def test_a_newer_backup_replaces_an_older_file(payer: Payer, tmp_path: Path) -> None:
    """A wallet that stayed behind gets the newer record; the older file stays beside it."""
    channel = opened(payer)
    path = payer.wallet.directory / f"{channel.name}.json"
    old = path.read_bytes()
    channel.pay(700)
    backup = read_backup(saved(payer.wallet, tmp_path / "copy.wallet"))
    payer.close()
    path.write_bytes(old)

    assert restore(payer.wallet, backup).replaced == (channel.name,)

    assert payer.wallet.read(channel.name).paid_sat == channel.paid_sat
    assert path.with_name(f"{path.name}.old").read_bytes() == old


def test_a_renamed_channel_is_not_restored_twice(payer: Payer, tmp_path: Path) -> None:
    """A channel is known by its keys, not by the name of its file; another channel of that name stays."""
    channel, other = opened(payer), opened(payer)
    backup = read_backup(saved(payer.wallet, tmp_path / "copy.wallet"))
    payer.close()
    directory = payer.wallet.directory
    (directory / f"{channel.name}.json").rename(directory / "mine.json")
    assert set(restore(payer.wallet, backup).kept) == {"mine", other.name}

    (directory / "mine.json").unlink()
    (directory / f"{other.name}.json").rename(directory / f"{channel.name}.json")
    done = restore(payer.wallet, backup)
    assert done.written == (f"{channel.name}-2",)
    assert payer.wallet.read(f"{channel.name}-2").private_key == channel.record.private_key


def test_a_channel_in_use_is_not_replaced(payer: Payer, tmp_path: Path) -> None:
    """A program that pays keeps its channel; the restore says so."""
    channel = opened(payer)
    backup = read_backup(saved(payer.wallet, tmp_path / "copy.wallet"))

    with pytest.raises(ChannelInUse):
        restore(Wallet(payer.wallet.directory), backup)
    channel.release()
    assert restore(Wallet(payer.wallet.directory), backup).kept == (channel.name,)


def test_another_seed_is_not_replaced(payer: Payer, tmp_path: Path) -> None:
    """A wallet with another seed refuses a backup before anything is written."""
    opened(payer)
    backup = read_backup(saved(payer.wallet, tmp_path / "copy.wallet"))
    there = Wallet(tmp_path / "other")
    there.seed.put(seed_of_words(ABANDON))

    with pytest.raises(OtherSeed):
        restore(there, backup)
    assert there.names() == []


def test_a_backup_is_private_and_replaces_no_file(payer: Payer, tmp_path: Path) -> None:
    """Its mode is 0600; an existing file stays; an impossible place is named."""
    opened(payer)
    path = saved(payer.wallet, tmp_path / "copy.wallet")

    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(BackupExists):
        saved(payer.wallet, path)
    for wrong in (tmp_path / "nowhere" / "copy.wallet", path / "copy.wallet"):
        with pytest.raises(BackupNotWritten, match=str(wrong)):
            saved(payer.wallet, wrong)
        with pytest.raises(NoBackup):
            read_backup(wrong)


def changed(text: str, field: str) -> str:
    """Change one hex digit in the middle of a field."""
    place = text.index(f'"{field}": "') + len(field) + 20
    return text[:place] + format(int(text[place], 16) ^ 1, "x") + text[place + 1 :]


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (lambda text: text[: len(text) // 2], DamagedFile),
        (lambda _: "", NotABackup),
        (lambda _: "[]", NotABackup),
        (lambda text: changed(text, "entropy"), DamagedFile),
        (lambda text: changed(text, "private_key"), DamagedFile),
        (lambda text: changed(text, "secret"), DamagedFile),
        (lambda text: text.replace('"next_index": 1', '"next_index": 0'), DamagedFile),
        (lambda text: text.replace('"format": 1', '"format": 2', 1), LaterFile),
        (lambda text: text.replace('"format": 1', '"novelty": 1, "format": 1', 1), LaterFile),
    ],
)
def test_a_changed_backup_is_refused(payer: Payer, tmp_path: Path, damage, error: type[Exception]) -> None:
    """One changed digit anywhere is found, also in the seed; nothing is restored."""
    opened(payer)
    path = saved(payer.wallet, tmp_path / "copy.wallet")
    text = path.read_text()
    path.write_text(damage(text))
    assert path.read_text() != text

    with pytest.raises(error):
        read_backup(path)


def test_the_newest_of_several_backups_is_taken(payer: Payer, tmp_path: Path) -> None:
    """The time of the backup decides, not the name of the file; a damaged one hides no other."""
    opened(payer)
    backup = take_backup(payer.wallet, NOW)[0]
    for name, age in (("z", 0), ("a", 60), ("m", 30)):
        older = Backup(created_at=NOW + age, seed=backup.seed, channels=())
        write_backup(take_backup(Wallet(tmp_path / name), older.created_at)[0], tmp_path / f"{name}.wallet")
    (tmp_path / "y.wallet").write_text("{")

    assert newest_backup(tmp_path).path == tmp_path / "a.wallet"
    with pytest.raises(NoBackup):
        newest_backup(tmp_path / "wallet")


def test_a_check_names_what_is_wrong(payer: Payer, tmp_path: Path) -> None:
    """Files that can't be read, keys of other words, and what a backup lacks; a wallet of an earlier version is named."""
    kept, paid, other, broken = (opened(payer) for _ in range(4))
    backup = read_backup(saved(payer.wallet, tmp_path / "copy.wallet"))
    assert check(payer.wallet, backup) == []
    paid.pay(5)
    later = opened(payer)
    payer.close()
    directory = payer.wallet.directory
    (directory / f"{broken.name}.json").write_text("{")
    foreign = msgspec.structs.replace(other.record, key_index=0)
    other._file = payer.wallet.lock(other.name)
    other._keep(foreign)
    other._file.release()

    found = {each.name: each.text for each in check(payer.wallet, backup)}

    assert set(found) == {paid.name, later.name, broken.name, other.name}
    assert "5 sat" in found[paid.name]
    assert "not in the backup" in found[later.name]
    assert "can't be trusted" in found[broken.name]
    assert "not that of this wallet's words" in found[other.name]
    (directory / "wallet.seed").unlink()
    assert "has no seed" in {each.name: each.text for each in check(payer.wallet)}[""]
    random = msgspec.structs.replace(kept.record, key_index=None)
    assert without_words([random, paid.record, msgspec.structs.replace(random, state=State.CLOSED)]) == [kept.name]


# --- commands -------------------------------------------------------------------------------------------------------


def test_fault_50_the_commands_lose_and_restore_a_wallet(payer: Payer, tmp_path: Path) -> None:
    """`backup`, `check`, `restore` and `check` again, with the output of each."""
    channel = opened(payer)
    payer.close()
    wallet = tmp_path / "wallet"
    (tmp_path / "usb").mkdir()
    shown = run("backup", tmp_path / "usb", wallet=wallet)
    [path] = (tmp_path / "usb").iterdir()
    assert f"Wrote 1 channel to {path}" in shown
    assert "no problem found" in run("check", tmp_path / "usb", wallet=wallet)
    shutil.rmtree(wallet)

    done = json.loads(run("restore", tmp_path / "usb", "--json", wallet=wallet))

    assert (done["written"], done["file"]) == ([channel.name], str(path))
    assert f"paychan channel status {channel.name}" in run("restore", path, wallet=wallet)
    assert json.loads(run("check", path, "--json", wallet=wallet)) == {
        "problems": [],
        "notes": [],
        "without_words": [],
        "channels": 1,
        "forgotten": 0,
        "backup": str(path),
        "skipped": [],
    }
    assert "exists already" in run("backup", path, wallet=wallet, status=1)
    assert "give either" in run("restore", wallet=wallet, status=1)


def test_a_backup_without_a_damaged_channel_says_so(payer: Payer, tmp_path: Path) -> None:
    """The others are saved; the exit status is 1."""
    channel, broken = opened(payer), opened(payer)
    payer.close()
    (tmp_path / "wallet" / f"{broken.name}.json").write_text("{")

    shown = json.loads(run("backup", tmp_path / "copy.wallet", "--json", wallet=tmp_path / "wallet", status=1))

    assert [each["name"] for each in shown["missing"]] == [broken.name]
    assert [record.name for record in read_backup(tmp_path / "copy.wallet").channels] == [channel.name]


def test_fault_50_words_are_shown_on_a_terminal_once_and_restore_the_keys(payer: Payer, tmp_path: Path) -> None:
    """They are asked for first, shown on a page that disappears, and typed at another place they are the same seed."""
    opened(payer)
    seed = payer.wallet.seed.read()
    wallet, other = tmp_path / "wallet", tmp_path / "other"

    with PseudoTerminal([PAYCHAN, "wallet", "words", "--wallet", wallet]) as terminal:
        terminal.read_until("access to all keys")
        terminal.enter("y")
        terminal.read_until("Press Enter when")
        page = terminal.text
        terminal.enter("")
        terminal.read_until("check --words")
    for number, word in enumerate(seed.words, 1):
        assert f"{number} {word}" in page
    with PseudoTerminal([PAYCHAN, "wallet", "restore", "--words", "--wallet", other]) as terminal:
        terminal.read_until("Word 1: ")
        terminal.enter(" ".join(word[:4] for word in seed.words))
        terminal.read_until("Word 13: ")
        terminal.enter("")
        terminal.read_until("not restored")
    assert Wallet(other).seed.read().words == seed.words


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT])
def test_fault_50_a_signal_takes_the_words_off_the_screen(payer: Payer, tmp_path: Path, number: int) -> None:
    """A process that ends at the question of the words page leaves that page first."""
    opened(payer)
    with PseudoTerminal([PAYCHAN, "wallet", "words", "--wallet", tmp_path / "wallet"]) as terminal:
        terminal.read_until("access to all keys")
        terminal.enter("y")
        terminal.read_until("Press Enter when")
        assert terminal.end_by(number) == 128 + number
        assert payer.wallet.seed.read().words[0] in terminal.text
        assert payer.wallet.seed.read().words[0] not in terminal.text_left


def test_words_go_to_no_pipe(payer: Payer, tmp_path: Path) -> None:
    """Without a terminal they are written to a new private file, or not at all; wrong ones are named."""
    opened(payer)
    words = payer.wallet.seed.read().words
    wallet, path = tmp_path / "wallet", tmp_path / "words"

    assert not set(words) & set(run("words", wallet=wallet, status=1).split())
    run("words", "--words-file", path, wallet=wallet)
    assert (path.read_text().split(), stat.S_IMODE(path.stat().st_mode)) == (words, 0o600)
    assert "exists already" in run("words", "--words-file", path, wallet=wallet, status=1)
    assert "no problem" in run("check", "--words-file", path, wallet=wallet)
    path.write_text(" ".join(ABANDON))
    assert "not the words of this wallet" in run("check", "--words-file", path, wallet=wallet, status=1)
    path.write_text("abandon zzzz")
    assert "zzzz" in run("restore", "--words-file", path, wallet=tmp_path / "new", status=1)
    assert not (tmp_path / "new" / "wallet.seed").exists()


def test_the_descriptor_never_changes() -> None:
    """The private descriptor of the first vector of BIP39, with the checksum of BIP380."""
    descriptor = payer_descriptor(to_seed(bytes(16)), Network.TEST)

    assert descriptor == DESCRIPTOR
