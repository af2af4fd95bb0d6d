"""A wallet's seed: the keys of new channels follow from it, in each process another one, and only its owner reads it."""

from __future__ import annotations

import stat
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from coincurve import PrivateKey

from paychan.client import DamagedFile, LaterFile, LooseMode, NoSeed, OtherSeed, Payer
from paychan.client.seed import NEW_ENTROPY_BYTES, Seed, SeedFile, seed_of_words
from paychan.client.wallet import Wallet
from tests.client.conftest import OpenChannel
from tests.client.liar import Liar

ABANDON = [*["abandon"] * 11, "about"]
"""The first vector of BIP39: 16 zero bytes."""

FROZEN_KEYS = [
    "0348dcfab19d055455ef49a37d4ab0dde683367f4772b7b1e8e9dfd559c651aa70",
    "02dda5d7972c3e1fee11e21d956a4958120ceddb2e07dfacc9ff16daa9d80c2787",
    "024603d6caf3b86b436a3dea2779a9148b823889f676a05ede7b7fc5a9c4e92192",
]
"""Public keys with the indices 0, 1 and 2^31 - 1 below the words `ABANDON`."""

NEW_CHANNELS = """
import sys
from paychan.client import Payer
payer = Payer(sys.argv[1], wallet=sys.argv[2])
for _ in range(int(sys.argv[3])):
    channel = payer.new_channel(hours=100)
    print(channel.name, channel.record.key_index, flush=True)
"""

TAKE_TURNS = """
import sys
from paychan.client import ChannelInUse, Payer
payer = Payer(wallet=sys.argv[1])
paid = 0
while paid < int(sys.argv[3]):
    try:
        with payer.channel(sys.argv[2]) as channel:
            channel.pay(1)
            paid += 1
    except ChannelInUse:
        pass
"""


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return Wallet(tmp_path / "wallet").directory


def test_keys_of_a_seed_never_change() -> None:
    """The words of BIP39's first vector give the same keys in every release: m/"pchw"'/i'."""
    seed = seed_of_words(ABANDON)

    found = [key.public_key.format().hex() for key in seed.keys([0, 1, 2**31 - 1])]

    assert found == FROZEN_KEYS
    assert seed.key(1).public_key.format().hex() == FROZEN_KEYS[1]
    with pytest.raises(ValueError, match="index"):
        seed.key(2**31)


def test_fault_50_keys_of_new_channels_follow_from_one_seed(liar: Liar, tmp_path: Path) -> None:
    """A wallet draws its seed with its first channel; the words alone give the keys of all its channels."""
    with Payer(liar.url, wallet=tmp_path / "wallet") as payer:
        records = [payer.new_channel(hours=100).record for _ in range(3)]
        seed = payer.wallet.seed.read()

    again = seed_of_words(seed.words)
    assert len(seed.words) == 12
    assert [record.key_index for record in records] == [0, 1, 2]
    assert [key.to_hex() for key in again.keys(range(3))] == [record.private_key for record in records]


def test_a_wallet_of_an_earlier_version_stays_usable(opened: OpenChannel, tmp_path: Path) -> None:
    """A channel with a random key of its own is read and pays, beside channels whose keys follow from the seed."""
    channel = opened()
    channel.release()
    path = tmp_path / "wallet" / f"{channel.name}.json"
    fields = msgspec.json.decode(path.read_bytes())
    del fields["key_index"]
    path.write_bytes(msgspec.json.encode(fields))
    (tmp_path / "wallet" / "wallet.seed").unlink()

    with Payer(wallet=tmp_path / "wallet") as payer:
        old = payer.channel(channel.name)
        assert old.record.key_index is None
        assert old.pay(5).total_paid_sat == channel.paid_sat + 5
        with pytest.raises(NoSeed):
            payer.wallet.seed.read()


def test_fault_50_two_processes_never_take_the_same_key(liar: Liar, tmp_path: Path) -> None:
    """Processes that make channels in one wallet at the same time get different keys of one seed."""
    command = [sys.executable, "-c", NEW_CHANNELS, liar.url, str(tmp_path / "wallet"), "6"]
    programs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    lines = [line.split() for program in programs for line in program.communicate(timeout=60)[0].splitlines()]

    assert [program.returncode for program in programs] == [0, 0]
    assert sorted(int(index) for _, index in lines) == list(range(12))
    wallet = Wallet(tmp_path / "wallet")
    seed = wallet.seed.read()
    records, problems = wallet.read_all()
    assert not problems
    assert {record.name for record in records} == {name for name, _ in lines}
    assert all(record.private_key == seed.key(record.key_index or 0).to_hex() for record in records)


def test_fault_50_two_processes_pay_over_one_channel_in_turns(liar: Liar, opened: OpenChannel, tmp_path: Path) -> None:
    """Every payment of each process counts once."""
    channel = opened()
    channel.release()
    command = [sys.executable, "-c", TAKE_TURNS, str(tmp_path / "wallet"), channel.name, "20"]
    programs = [subprocess.Popen(command) for _ in range(2)]

    assert [program.wait(timeout=60) for program in programs] == [0, 0]
    assert Wallet(tmp_path / "wallet").read(channel.name).paid_sat == channel.paid_sat + 40 == liar.received_sat


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o660, 0o602, 0o610])
def test_fault_50_a_file_that_others_may_use_is_refused(
    liar: Liar, opened: OpenChannel, tmp_path: Path, mode: int
) -> None:
    """The refusal of a channel's file or a seed has the command that mends it; other channels stay usable."""
    channel, other = opened(), Payer(liar.url, wallet=tmp_path / "wallet").new_channel(hours=100)
    channel.release()
    path, seed = tmp_path / "wallet" / f"{channel.name}.json", tmp_path / "wallet" / "wallet.seed"
    path.chmod(mode)
    seed.chmod(mode)
    with Payer(wallet=tmp_path / "wallet") as payer:
        with pytest.raises(LooseMode, match=rf"mode {mode:04o}\): chmod 600 '{path}'"):
            payer.channel(channel.name)
        with pytest.raises(LooseMode, match=f"chmod 600 '{seed}'"):
            payer.wallet.seed.new_key()
        assert [record.name for record in payer.records()] == [other.name]
        path.chmod(0o600)
        assert payer.channel(channel.name).pay(1)


@pytest.mark.parametrize("mode", [0o755, 0o750, 0o701, 0o777, 0o710])
def test_fault_50_a_directory_that_others_may_use_is_refused(tmp_path: Path, mode: int) -> None:
    """A wallet's directory is its owner's alone; a new one is made so, whatever the umask."""
    directory = tmp_path / "wallet"
    directory.mkdir()
    directory.chmod(mode)

    with pytest.raises(LooseMode, match=f"chmod 700 '{directory}'"):
        Payer(wallet=directory)

    directory.chmod(0o700)
    assert Payer(wallet=directory).records() == []
    assert stat.S_IMODE(Wallet(tmp_path / "new").directory.stat().st_mode) == 0o700


def test_a_leftover_of_an_interrupted_write_gives_no_other_mode(directory: Path) -> None:
    """A temporary file that others may read is replaced, not filled."""
    (directory / ".wallet.seed.new").write_text("old")
    (directory / ".wallet.seed.new").chmod(0o666)

    SeedFile(directory).new_key()

    assert stat.S_IMODE((directory / "wallet.seed").stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", DamagedFile),
        ("{}", DamagedFile),
        ('{"format":1,"entropy":"00","next_index":0}', DamagedFile),
        ('{"format":1,"entropy":"zz","next_index":0}', DamagedFile),
        ('{"format":1,"entropy":"%s","next_index":-1}' % ("00" * 16), DamagedFile),
        ('{"format":2,"entropy":"%s","next_index":1}' % ("00" * 16), LaterFile),
        ('{"format":1,"entropy":"%s","novelty":1}' % ("00" * 16), LaterFile),
    ],
)
def test_a_damaged_seed_is_refused_and_never_replaced(directory: Path, text: str, error: type[Exception]) -> None:
    """A seed that can't be read makes no key; its file stays for the owner to restore."""
    file = SeedFile(directory)
    file.path.touch(0o600)
    file.path.write_text(text)

    for use in (file.read, file.new_key, lambda: file.put(seed_of_words(ABANDON))):
        with pytest.raises(error):
            use()
    assert file.path.read_text() == text


def test_a_stored_seed_keeps_the_higher_index_and_no_other_seed(directory: Path) -> None:
    """A seed from a backup never lowers the index of the next key, and never replaces another seed."""
    file = SeedFile(directory)
    file.put(seed_of_words(ABANDON, 7))
    assert file.new_key()[1] == 7
    file.put(seed_of_words(ABANDON, 3))
    assert file.read().next_index == 8
    with pytest.raises(OtherSeed):
        file.put(Seed(entropy="11" * NEW_ENTROPY_BYTES))
    assert file.read().words == ABANDON


def test_no_secret_is_shown(directory: Path) -> None:
    """Neither `repr` nor an error shows the entropy or a key."""
    file = SeedFile(directory)
    key, _ = file.new_key()
    seed = file.read()
    file.path.write_text(file.path.read_text().replace('"entropy": "', '"entropy": "x'))

    with pytest.raises(DamagedFile) as caught:
        file.read()

    assert isinstance(key, PrivateKey)
    for shown in (repr(seed), str(seed), str(caught.value), repr(caught.value)):
        assert seed.entropy not in shown
