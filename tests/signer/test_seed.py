"""The seed file: refusals, detection of all damage, and changes that always leave usable keys."""

from __future__ import annotations

import io
import os
import stat
import traceback
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import msgspec
import pytest
from rich.console import Console

from paychan.protocol.kinds.base import make_terms
from paychan.protocol.types import UnixTime
from signer.config import SignerConfig, load_signer_config
from signer.keys.ring import DEBUG_KEY, KeyRing, hardened_keys, rbpcp_v2_keys
from signer.secret import file as privatefile
from signer.secret.sources import NoSecret, Secret
from signer.seed import encryption as sealed
from signer.seed import file as seed
from signer.seed import open as keystore
from signer.seed.encryption import Cost, Damaged, WrongPassphrase, seal, unseal
from signer.seed.file import (
    Seed,
    SeedError,
    change_seeds,
    create_seeds,
    draw_seed,
    encrypt_plain_seed,
    read_plain_seed,
    read_seeds,
    seed_of_hex,
    seed_of_words,
)
from signer.seed.open import open_seeds, passphrase_sources, seed_sources, trees
from tests.lib import background
from tests.signer.messages import CLIENT_KEY, EXPIRY

HEX = "00112233445566778899aabbccddeeff" * 2
WORD = b"correct horse battery staple"
CHEAP = Cost(2)
NOW = UnixTime(1_800_000_000)
OLD, NEW = Seed("bip39", bytes(range(32)), NOW), Seed("bip39", bytes(range(1, 33)), NOW)
RAW = Seed("raw", bytes.fromhex(HEX), NOW)


def secret(text: bytes = WORD) -> Secret:
    return Secret(bytearray(text))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file with two generations."""
    path = tmp_path / "signer.seed"
    create_seeds(path, [NEW, OLD], secret(), CHEAP)
    return path


# --- encryption -------------------------------------------------------------------------------------------------------


def test_encrypted_content_is_decrypted_and_differs_each_time() -> None:
    """Content is decrypted with the passphrase; the bytes differ each time, and contain neither content nor passphrase."""
    first, second = (seal(HEX.encode(), bytearray(WORD), CHEAP) for _ in range(2))

    assert unseal(first, bytearray(WORD)) == unseal(second, bytearray(WORD)) == HEX.encode()
    assert first != second
    for hidden in (HEX.encode(), bytes.fromhex(HEX), WORD):
        assert hidden not in first


def test_every_changed_byte_is_found() -> None:
    """If any bit of the file flips, or bytes are missing or added, it is reported as damaged, without content."""
    whole = seal(b"seed", bytearray(WORD), CHEAP)
    damaged = [
        whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :] for at in range(len(whole)) for bit in range(8)
    ]
    damaged += [whole[:size] for size in range(len(whole))] + [whole + b"\n", b" " + whole, whole + whole]

    for data in damaged:
        with pytest.raises(Damaged):
            unseal(data, bytearray(WORD))
        with pytest.raises(Damaged):
            sealed.check(data)


def changed(data: bytes, **values: Any) -> bytes:
    """The file with other values and a right checksum, as a forger would write it."""
    file = msgspec.json.decode(data, type=sealed._File)
    file = msgspec.structs.replace(file, **values)
    return sealed._write(sealed._header(file), file.sealed)


def test_header_is_authenticated() -> None:
    """Another header with a right checksum opens nothing: neither values that change the key, nor any other."""
    whole = seal(b"seed", bytearray(WORD), CHEAP)

    for values in ({"n": 4}, {"r": 16}, {"p": 2}, {"salt": bytes(16)}, {"nonce": bytes(12)}):
        with pytest.raises(WrongPassphrase):
            unseal(changed(whole, **values), bytearray(WORD))


@pytest.mark.parametrize(
    "values",
    [
        {"n": 1 << 40}, {"n": 1 << 20}, {"n": 3}, {"n": 0}, {"n": 1}, {"n": -2}, {"r": 7}, {"r": 1 << 30}, {"p": 0},
        {"p": 1 << 20}, {"salt": b""}, {"nonce": bytes(24)}, {"sealed": bytes(15)}, {"kdf": "md5"}, {"aead": "none"},
        {"format": "other"}, {"version": 0},
    ],
    ids=str,
)  # fmt: skip
def test_header_that_asks_for_too_much_is_refused(values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters that would take too much memory or time, or have another meaning, are refused before a key is derived."""
    monkeypatch.setattr(sealed, "_derive", lambda *_arguments: pytest.fail("a key was made"))
    with pytest.raises(Damaged, match="no release has written"):
        unseal(changed(FROZEN.encode(), **values), bytearray(WORD))


def test_file_of_a_newer_release_is_reported() -> None:
    """An unknown version is not reported as damage: a newer release reads it."""
    with pytest.raises(Damaged, match="it has version 2 of a newer release"):
        unseal(changed(FROZEN.encode(), version=2), bytearray(WORD))


def test_chosen_cost_is_high_and_within_the_bound() -> None:
    """The cost for a chosen passphrase is 128 MiB, which the bound allows."""
    assert 128 * sealed.CHOSEN.n * sealed.CHOSEN.r == 128 * 2**20 <= sealed.MAX_COST_BYTES
    assert unseal(seal(b"seed", bytearray(WORD), sealed.CHOSEN), bytearray(WORD)) == b"seed"


FROZEN = """\
{"format":"paychan-seed","version":1,"kdf":"scrypt","n":16,"r":8,"p":1,"salt":"A3ex5FS3hOcinYpVTUvsBw==","aead":"chacha20-poly1305","nonce":"6inSttBQZ9usBcQx","sealed":"C4uscRyCgG7tUUj34LLgakkdanEGDrzPA9/nS1pwHnIEmYRyqLpOcSNdwBxP8V26GdSs7GMHE7J6zXteTA7gFnLoV02zEUCOkSD3uzAuU45k0d0nXpovDE1cErOFm70/9QmIDPyQiIlntKOMzExCUQ5iK/cyGmqhc21R0uKRUdO7VXW+HcSaQhtp6DmFGHT9/CkRa3xpf7sS","checksum":"X2Sxh+X6R58="}
"""


def test_frozen_file_is_read_for_ever(tmp_path: Path) -> None:
    """A file that an earlier release wrote is read."""
    path = tmp_path / "signer.seed"
    path.touch(0o600)
    path.write_text(FROZEN)
    assert read_seeds(path, secret()) == (NEW, OLD, RAW)


# --- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o600, 0o400])
def test_private_file_is_read(file: Path, mode: int) -> None:
    """A file that only its owner can use is read: all generations, the newest first."""
    file.chmod(mode)
    assert read_seeds(file, secret()) == (NEW, OLD)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o601, 0o666, 0o700 | 0o010])
def test_file_that_others_can_use_is_refused(file: Path, mode: int) -> None:
    """Any right of group or others on the file is refused, with the remedy."""
    file.chmod(mode)
    with pytest.raises(SeedError, match=f"mode {mode:04o}.*chmod 600"):
        read_seeds(file, secret())


@pytest.mark.skipif(os.geteuid() != 0, reason="giving a file away needs root")
def test_file_of_another_user_is_refused(file: Path) -> None:
    """A seed file that belongs to another user is refused, even if it can be read."""
    os.chown(file, 12345, -1)
    with pytest.raises(SeedError, match=r"belongs to uid 12345.*chown"):
        read_seeds(file, secret())


def test_link_is_refused(file: Path, tmp_path: Path) -> None:
    """A symbolic link is not followed: its target may change hands."""
    link = tmp_path / "link"
    link.symlink_to(file)
    with pytest.raises(SeedError, match="can't be opened"):
        read_seeds(link, secret())


def test_pipe_and_directory_are_refused(tmp_path: Path) -> None:
    """Neither a pipe (without waiting for its writer) nor a directory is a seed file."""
    os.mkfifo(tmp_path / "pipe", 0o600)
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(SeedError, match="not a regular file"):
            read_seeds(path, secret())


def test_missing_file_says_what_to_do(tmp_path: Path) -> None:
    """The error for a missing seed names the remedies: the backup, or a new one."""
    with pytest.raises(SeedError, match=r"restore it from the backup.*recover.*or create a new one"):
        read_seeds(tmp_path / "none", secret())


def test_wrong_passphrase_and_damage_are_distinguished(file: Path) -> None:
    """A wrong passphrase is reported as such, a damaged file as damaged, with the remedy."""
    with pytest.raises(SeedError, match=r"wrong passphrase$"):
        read_seeds(file, secret(b"another"))
    content = bytearray(file.read_bytes())
    content[150] ^= 1
    file.write_bytes(content)
    with pytest.raises(SeedError, match=r"is damaged, .*restore it from the backup, or `paychan-signer recover"):
        read_seeds(file, secret())


@pytest.mark.parametrize("text", [HEX, HEX + "\n"])
def test_plain_seed_is_refused_with_the_remedy(tmp_path: Path, text: str) -> None:
    """A plain seed of an earlier release is refused, with the name of the command that encrypts it."""
    path = tmp_path / "signer.seed"
    path.touch(0o600)
    path.write_text(text)
    with pytest.raises(SeedError, match="not encrypted: `paychan-signer encrypt FILE`") as refused:
        read_seeds(path, secret())
    assert HEX[:16] not in str(refused.value)


@pytest.mark.parametrize(
    "content",
    ["", HEX[:-1], HEX + "0", HEX[:-1] + "g", HEX.upper(), f" {HEX}", f"{HEX}\n\n", f"0x{HEX[2:]}", HEX[:63] + "\n0"],
)
def test_anything_else_is_refused(tmp_path: Path, content: str) -> None:
    """Other content is refused without showing any of it, as an encrypted file and as a plain one."""
    path = tmp_path / "signer.seed"
    path.touch(0o600)
    path.write_text(content)
    for read in (lambda: read_seeds(path, secret()), lambda: read_plain_seed(path, NOW)):
        with pytest.raises(SeedError, match=r"is damaged|does not hold 64 lower-case hex digits") as refused:
            read()
        assert HEX[:16] not in str(refused.value).lower()


def test_debug_key_is_no_seed(tmp_path: Path) -> None:
    """The publicly known debug key is refused as a seed: in a file, encrypted or plain, as digits and as words."""
    create_seeds(tmp_path / "a", [OLD], secret(), CHEAP)
    content = seal(msgspec.msgpack.encode((Seed("raw", DEBUG_KEY, NOW),)), bytearray(WORD), CHEAP)
    (tmp_path / "a").write_bytes(content)
    (tmp_path / "b").touch(0o600)
    (tmp_path / "b").write_text(DEBUG_KEY.hex())
    words = seed.mnemonic.to_words(DEBUG_KEY)

    for use in (
        lambda: read_seeds(tmp_path / "a", secret()),
        lambda: read_plain_seed(tmp_path / "b", NOW),
        lambda: seed_of_hex(DEBUG_KEY.hex(), NOW),
        lambda: seed_of_words(words, NOW),
    ):
        with pytest.raises(SeedError, match="publicly known"):
            use()


def test_raw_seeds_of_other_lengths() -> None:
    """A raw seed has 16 to 64 bytes, in digits of either case."""
    assert seed_of_hex(f" {HEX.upper()}\n", NOW) == RAW
    for text in ("", "00" * 15, "00" * 65, "0" * 63, HEX[:-1] + "g"):
        with pytest.raises(SeedError, match="this is no seed: 32 to 128 hex digits"):
            seed_of_hex(text, NOW)


# --- writing ----------------------------------------------------------------------------------------------------------


def test_created_file_is_private_and_readable(tmp_path: Path) -> None:
    """A new file has mode 0600 with any umask, makes its directory private, and two random seeds differ."""
    previous = os.umask(0)
    try:
        drawn = [draw_seed(NOW), draw_seed(NOW)]
        create_seeds(tmp_path / "state" / "a", drawn, secret(), CHEAP)
    finally:
        os.umask(previous)

    assert (tmp_path / "state" / "a").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700
    assert read_seeds(tmp_path / "state" / "a", secret()) == tuple(drawn)
    assert drawn[0].secret != drawn[1].secret
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["a"]


@pytest.mark.parametrize("make", [Path.touch, Path.mkdir, lambda path: path.symlink_to("/nowhere")])
def test_existing_file_is_never_replaced(tmp_path: Path, make: Any) -> None:
    """An existing file, directory or dangling link of the name is left alone."""
    path = tmp_path / "taken"
    make(path)
    before = path.lstat()
    with pytest.raises(SeedError, match="exists already and was left alone"):
        create_seeds(path, [OLD], secret(), CHEAP)
    assert path.lstat() == before


def test_plain_seed_is_encrypted_with_the_same_keys(tmp_path: Path) -> None:
    """Encrypting replaces the plain file by one with the same seed, and can't be done twice."""
    path = tmp_path / "signer.seed"
    path.touch(0o600)
    path.write_text(HEX + "\n")

    encrypt_plain_seed(path, secret(), CHEAP, NOW)

    assert read_seeds(path, secret()) == (RAW,)
    assert RAW.master == bytes.fromhex(HEX)
    assert HEX.encode() not in path.read_bytes()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(SeedError, match="is encrypted already"):
        encrypt_plain_seed(path, secret(), CHEAP, NOW)


def test_other_passphrase_opens_all_generations(file: Path) -> None:
    """After a change of passphrase only the new one opens the file; the content is the same."""
    change_seeds(file, secret(), CHEAP, new_passphrase=secret(b"another passphrase"))

    assert read_seeds(file, secret(b"another passphrase")) == (NEW, OLD)
    with pytest.raises(SeedError, match="wrong passphrase"):
        read_seeds(file, secret())


def test_two_changes_at_once_lose_nothing(file: Path) -> None:
    """While one command changes the file, a second one is refused and does not overwrite the change."""

    def meanwhile(seeds: tuple[Seed, ...]) -> tuple[Seed, ...]:
        with pytest.raises(SeedError, match="another command is changing"):
            change_seeds(file, secret(), CHEAP, lambda seeds: seeds[:1])
        return (RAW, *seeds)

    change_seeds(file, secret(), CHEAP, meanwhile)

    assert read_seeds(file, secret()) == (RAW, NEW, OLD)


def test_file_is_read_back_before_it_counts(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the disk or the cipher returns other bytes than were written, the old file stays."""
    monkeypatch.setattr(privatefile, "read_private", lambda _path, _most: bytearray(b"something else"))
    with pytest.raises(SeedError, match="does not hold what was written to it"):
        change_seeds(file, secret(), CHEAP, lambda seeds: (RAW, *seeds))
    monkeypatch.setattr(seed, "seal", lambda *_arguments: file.read_bytes())
    with pytest.raises(SeedError, match="can't be decrypted"):
        change_seeds(file, secret(), CHEAP, lambda seeds: (RAW, *seeds))
    monkeypatch.undo()
    assert read_seeds(file, secret()) == (NEW, OLD)


# --- crashes ----------------------------------------------------------------------------------------------------------

STEPS = ("open", "fsync", "replace", "rename", "link", "unlink", "fchmod", "readv")


class Killed(BaseException):
    """The process ends here."""


def killed_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """End the process at its n-th call that reads or changes the disk."""
    numbers = count()

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **named: Any) -> Any:
            if next(numbers) == step:
                raise Killed
            return call(*arguments, **named)

        return run

    for name in STEPS:
        monkeypatch.setattr(os, name, counted(getattr(os, name)))


def every_death(change: Callable[[], Any]) -> Iterator[bool]:
    """Run a change repeatedly, each time ended one step later; yield whether it was complete."""
    for step in count():
        with pytest.MonkeyPatch.context() as patch:
            killed_at(step, patch)
            try:
                change()
            except Killed:
                ended = False
            else:
                ended = True
        yield ended
        if ended:
            assert step > 8
            return


def test_rotation_that_is_cut_off_leaves_old_or_new(file: Path) -> None:
    """A rotation that ends at any step leaves all old generations, or also the new one; the next rotation succeeds."""
    before = (NEW, OLD)
    for ended in every_death(lambda: change_seeds(file, secret(), CHEAP, lambda seeds: (RAW, *seeds))):
        after = read_seeds(file, secret())
        assert after == (RAW, *before) or (after == before and not ended)
        change_seeds(file, secret(), CHEAP, lambda _seeds: before)
        assert read_seeds(file, secret()) == before
    assert list(file.parent.iterdir()) == [file]


def test_creation_that_is_cut_off_can_be_done_again(tmp_path: Path) -> None:
    """A creation that ends at any step leaves no file, or a whole one."""
    path = tmp_path / "state" / "signer.seed"
    for ended in every_death(lambda: create_seeds(path, [OLD], secret(), CHEAP)):
        if not path.exists():
            assert not ended
            create_seeds(path, [OLD], secret(), CHEAP)
        assert read_seeds(path, secret()) == (OLD,)
        path.unlink()


def test_encryption_that_is_cut_off_leaves_plain_or_encrypted(tmp_path: Path) -> None:
    """An encryption that ends at any step leaves the seed in plain text or encrypted."""
    path = tmp_path / "signer.seed"
    path.touch(0o600)
    path.write_text(HEX)
    for _ended in every_death(lambda: encrypt_plain_seed(path, secret(), CHEAP, NOW)):
        if path.read_bytes() != HEX.encode():
            assert read_seeds(path, secret()) == (RAW,)
        path.write_text(HEX)


# --- generations ------------------------------------------------------------------------------------------------------


def config(directory: Path, text: str = 'mode = "hardened"', rest: str = "") -> SignerConfig:
    file = directory / "signer.toml"
    file.write_text(f'network = "regtest"\nstate_dir = "{directory}"\n[key]\n{text}\n{rest}')
    return load_signer_config(file)


@pytest.mark.parametrize("mode", ["hardened", "rbpcp-v2"])
@pytest.mark.parametrize("grow", [hardened_keys, rbpcp_v2_keys])
def test_channels_of_every_generation_and_mode_are_still_signed(tmp_path: Path, mode: str, grow: Any) -> None:
    """With any key.mode, the key of a channel of either mode and any generation is found."""
    ring = KeyRing(trees(config(tmp_path, f'mode = "{mode}"'), (NEW, OLD, RAW)))

    for generation in (NEW, OLD, RAW):
        before = grow(generation.master).channel_key(CLIENT_KEY, EXPIRY, create=False)
        key = ring.find(make_terms(before.public_key, CLIENT_KEY, EXPIRY))
        assert key is not None
        assert background.run(key.sign, bytes(32)) == background.run(before.sign, bytes(32))
    now = {"hardened": hardened_keys, "rbpcp-v2": rbpcp_v2_keys}[mode](NEW.master)
    assert ring.new(CLIENT_KEY, EXPIRY).public_key == now.channel_key(CLIENT_KEY, EXPIRY, create=True).public_key
    assert next(ring.destinations(CLIENT_KEY, EXPIRY)).key is not None
    assert ring.reserve().public_key == now.reserve_key().public_key


def test_seed_is_created_only_if_the_configuration_says_so(tmp_path: Path) -> None:
    """Without create_if_missing a missing seed is an error, and no file is written."""
    with pytest.raises((SeedError, NoSecret)):
        seed_sources(config(tmp_path), None, private(tmp_path / "p"))
    assert not (tmp_path / "signer.seed").exists()


def private(path: Path, text: bytes = WORD) -> Path:
    path.touch(0o600)
    path.write_bytes(text)
    return path


def test_created_seed_has_a_created_passphrase_beside_it(tmp_path: Path) -> None:
    """If a seed is created without a passphrase, one is created too, and opens the file at the next start."""
    settings = config(tmp_path, 'mode = "hardened"\ncreate_if_missing = true')
    sources = passphrase_sources(settings)

    first = open_seeds(settings, sources)

    assert open_seeds(settings, sources) == first
    for name in ("signer.seed", "signer.passphrase"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600
    assert len((tmp_path / "signer.passphrase").read_text().strip()) == 64


def test_created_seed_uses_a_configured_passphrase(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A configured passphrase encrypts the created seed, at the cost of a chosen one, and none is written."""
    monkeypatch.setattr(keystore, "CHOSEN", Cost(4))
    text = f'mode = "hardened"\ncreate_if_missing = true\npassphrase_file = "{private(tmp_path / "p")}"'
    settings = config(tmp_path, text)

    first = open_seeds(settings, passphrase_sources(settings))

    assert read_seeds(settings.seed_path, secret()) == first
    assert '"n":4,' in settings.seed_path.read_text()
    assert not (tmp_path / "signer.passphrase").exists()


# --- secrets ----------------------------------------------------------------------------------------------------------


def test_nothing_shows_a_seed(file: Path) -> None:
    """Neither text forms of a seed nor the traceback of any refusal contain a part of seed, words or passphrase."""
    console = Console(file=io.StringIO())
    console.print(OLD, [OLD], {"seed": RAW})
    shown = [repr(OLD), str(OLD), repr([OLD, RAW]), f"{OLD}", console.file.getvalue()]  # type: ignore[attr-defined]
    for wrong in (
        lambda: read_seeds(file, secret(b"another passphrase")),
        lambda: create_seeds(file, [OLD], secret(), CHEAP),
        lambda: seed_of_words([*seed.mnemonic.to_words(OLD.secret)[1:], "zoo"], NOW),
        lambda: seed_of_hex(HEX[:-1], NOW),
        lambda: seed_of_words([HEX] * 12, NOW),
    ):
        with pytest.raises(SeedError) as refused:
            wrong()
        lines = traceback.TracebackException.from_exception(refused.value)
        shown.append(str(refused.value) + "".join(lines.format(chain=True)))
    words = seed.mnemonic.to_words(OLD.secret)
    hidden = [
        HEX[:16],
        OLD.secret.hex(),
        str(OLD.secret)[:20],
        OLD.master.hex(),
        words[3],
        WORD.decode(),
        "another pass",
    ]
    for text in shown:
        for part in hidden:
            assert part not in text.replace('secret(b"another passphrase")', "")
