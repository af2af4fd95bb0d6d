"""Commands about keys, called as a script calls them: their files, refusals and output."""

from __future__ import annotations

import os
import re
import stat
import subprocess
from pathlib import Path

import pytest

from paychan.protocol.address import decode_address
from paychan.protocol.types import Network
from paychan.protocol.wire.signer_messages import KeyReply, KeyRequest, Refusal, SettlementReply
from paychan.shared.called import as_called
from paychan.shared.words import to_words
from signer.cli import seed as commands
from signer.keys.ring import DEBUG_KEY, KeyRing, hardened_keys
from signer.seed import open as keystore
from tests.lib.signer_process import COMMAND, SignerProcess
from tests.signer.messages import CLIENT_KEY, EXPIRY, make_request, mutated
from tests.signer.place import ABANDON, WORD, Place, call, make_place, private, recovered, run
from tests.signer.talking import ask, show

HEX = "00112233445566778899aabbccddeeff" * 2
ADDRESSES = (
    "mm9mm96b8bZRBacaAvY5MEeDd6HW46qFcY",
    "mipcBbFg9gMiCh81Kj8tqqdgoZub1ZJRfn",
    "n1egEEx4LEYp5Wmovm5ZTFT9JiX8HF9ymT",
)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return make_place(tmp_path)


@pytest.fixture(autouse=True)
def _no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)


def test_init_of_a_script_writes_the_words(place: Place, tmp_path_factory: pytest.TempPathFactory) -> None:
    """With --words-file the words are in a new private file that recovers the same seed; no word is shown.

    A word of the seed may also occur in the sentences of `init`; then it is in the output for another seed, too.
    """
    path = place.file.with_name("words")

    result = run(place, "init", "--destination", "seed", "--words-file", str(path))

    (seed,) = place.seeds()
    assert (result.status, path.read_text()) == (0, " ".join(to_words(seed.secret)) + "\n")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    other = make_place(tmp_path_factory.mktemp("other"))
    sentences = run(other, "init", "--destination", "seed", "--words-file", str(other.file.with_name("words"))).output
    assert not set(path.read_text().split()) & set(result.output.split()) - set(sentences.split())
    assert run(place, "verify", "--words-file", str(path)).status == 0


def test_init_needs_a_terminal_to_show_the_words(place: Place) -> None:
    """Without a terminal and without --words-file no seed is created, and the output names the option for scripts."""
    result = run(place, "init")

    assert result.status == 2
    assert "--words-file PATH" in result.output
    assert not place.seed.exists()


def test_init_and_recover_overwrite_nothing(place: Place) -> None:
    """Neither command writes over a seed; with an existing words file, no seed is created."""
    words = private(place.file.with_name("words"), "old")
    first = run(place, "init", "--destination", "seed", "--words-file", str(words))
    assert first.status == 2
    assert words.read_text() == "old"
    assert not place.seed.exists()

    recovered(place)
    before = place.seed.read_bytes()
    for command in ("init", "recover"):
        result = run(place, command, text=ABANDON)
        assert result.status == 2
        assert "exists already and was left alone" in result.output
    assert place.seed.read_bytes() == before


def test_words_of_a_seed_that_was_not_stored_are_removed(place: Place) -> None:
    """If the seed can't be written, no words file is left that would look like its backup."""
    words = place.file.with_name("words")
    text = place.file.read_text() + 'seed_file = "/proc/signer.seed"\n'
    place.file.write_text(text)

    result = run(place, "init", "--destination", "seed", "--words-file", str(words))

    assert result.status == 2
    assert "/proc/signer.seed.new can't be written" in result.output
    assert not words.exists()


def test_init_needs_a_passphrase(place: Place) -> None:
    """Without any source of a passphrase no seed is created, and all sources are listed."""
    result = call("init", place.file, "--destination", "seed", "--words-file", place.file.with_name("words"))

    assert result.status == 2
    assert "--passphrase-fd N, --passphrase-file PATH, key.passphrase_file" in result.output
    assert not place.seed.exists()


@pytest.mark.parametrize("mode", ["debug", "pkcs11"])
def test_modes_without_a_seed_are_refused(tmp_path: Path, mode: str) -> None:
    """A configuration whose keys come from another source has no seed to make."""
    rest = f'[settlement]\ndestination_address = "{ADDRESSES[0]}"\n[pkcs11]\nmodule = "/lib/x"\ntoken = "t"\n'
    place = make_place(tmp_path, mode, rest)
    if mode == "debug":
        place.file.write_text('network = "test"\ndebug = true\n' + place.file.read_text().split("\n", 1)[1])

    for command in ("init", "recover", "verify", "encrypt", "passphrase", "rotate seed", "export-xpub"):
        assert f'key.mode: "{mode}" has no seed' in run(place, command).output


def test_recovered_seed_is_that_of_the_words(place: Place) -> None:
    """Words from standard input and from a file give the same tree as in other wallets; the fingerprint is BIP32's."""
    recovered(place)

    assert place.seeds()[0].fingerprint == "73c5da0a"
    assert "73c5da0a newest yes, this is its backup" in run(place, "verify", text=ABANDON).output


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("abandon " * 11 + "abuot", 'word 12, "abuot", is not one of the 2048 words: perhaps about'),
        ("abandon " * 12, "checksum is wrong"),
        ("abandon " * 11, "got 11 words, a backup has 12, 15, 18, 21 or 24"),
        (" ".join(to_words(DEBUG_KEY)), "publicly known"),
        ("", "got 0 words"),
    ],
)
def test_wrong_words_make_no_seed(place: Place, text: str, message: str) -> None:
    """The fault in the words is reported, and no seed is created."""
    result = run(place, "recover", text=text)

    assert result.status == 2
    assert message in result.output
    assert not place.seed.exists()


def test_words_in_a_file_that_others_can_read_are_refused(place: Place) -> None:
    """A file with words must be as private as the seed."""
    words = private(place.file.with_name("words"), ABANDON)
    words.chmod(0o644)
    assert "others can use it" in run(place, "recover", "--words-file", str(words)).output
    assert not place.seed.exists()


def test_older_backups_are_added_behind_the_newer(place: Place) -> None:
    """After the newest backup, older ones of both kinds are added; the same one twice, or --older first, is refused."""
    assert "there is no" in run(place, "recover", "--older", text=ABANDON).output
    recovered(place)

    assert run(place, "recover", "--older", "--hex", text=HEX).status == 0

    assert [seed.kind for seed in place.seeds()] == ["bip39", "raw"]
    assert "in the file already" in run(place, "recover", "--older", text=ABANDON).output
    result = run(place, "verify", "--hex", text=HEX)
    assert re.search("73c5da0a newest no .* 1 before yes, this is its backup", result.output)
    assert result.status == 0


def test_verify_of_another_backup_is_a_failure(place: Place) -> None:
    """A backup of another seed ends with status 1 and its fingerprint."""
    recovered(place)
    result = run(place, "verify", text="zoo " * 11 + "wrong")
    assert result.status == 1
    assert "73c5da0a newest no This is the backup of" in result.output


def test_rotated_seed_is_added_before_the_old(place: Place) -> None:
    """A rotation adds a new generation with its own words; the old one stays until `forget` removes it."""
    recovered(place)
    words = place.file.with_name("words")

    result = run(place, "rotate seed", "--words-file", str(words))

    assert result.status == 0
    newest, old = place.seeds()
    assert to_words(newest.secret) == words.read_text().split()
    assert old.fingerprint == "73c5da0a"
    assert f"forget {place.file} 73c5da0a" in result.output
    assert "from the signer's next start on" in result.output
    assert call("forget", place.file, newest.fingerprint, "--passphrase-file", place.passphrase).status == 2
    assert call("forget", place.file, "73c5da0a", "--passphrase-file", place.passphrase).status == 0
    assert place.seeds() == (newest,)


def test_old_channels_are_settled_after_a_rotation(tmp_path: Path) -> None:
    """After a rotation and a restart, new channels get other keys; an old one is settled to the new destination."""
    with SignerProcess(tmp_path) as running:
        old = KeyRing([hardened_keys(running.master)])
        request = make_request(old)
        rotated = call("rotate", "seed", running.file, "--words-file", tmp_path / "words")
        assert rotated.status == 0
        before = ask(running.socket, KeyRequest(1, CLIENT_KEY, EXPIRY))
        running.stop()
        running.start()

        after = ask(running.socket, KeyRequest(1, CLIENT_KEY, EXPIRY))
        assert isinstance(before, KeyReply)
        assert isinstance(after, KeyReply)
        show(running.socket, request)
        retired = ask(running.socket, request)
        settled = ask(running.socket, mutated(request, "destination_script", after.destination_script))

    assert before.server_key == old.new(CLIENT_KEY, EXPIRY).public_key
    assert after.server_key == hardened_keys(running.master).channel_key(CLIENT_KEY, EXPIRY, create=True).public_key
    assert after.server_key != before.server_key
    assert isinstance(settled, SettlementReply)
    assert isinstance(retired, Refusal)


def test_commands_that_only_read_create_no_seed(place: Place) -> None:
    """Even if the signer may create a seed at its start, a command that only reads creates none."""
    place.file.write_text(place.file.read_text() + "create_if_missing = true\n")
    for command in ("export-xpub", "verify"):
        assert "there is no" in run(place, command).output
    assert not place.seed.exists()


def test_rotation_without_a_terminal_changes_nothing(place: Place) -> None:
    """Without a terminal and without --words-file the seed stays the same."""
    before = recovered(place).seed.read_bytes()
    assert run(place, "rotate seed").status == 2
    assert place.seed.read_bytes() == before


def test_encrypt_keeps_the_keys_of_a_plain_seed(place: Place) -> None:
    """The signer refuses a plain seed at its start and names the command that encrypts it, which keeps the seed."""
    private(place.seed, HEX + "\n")
    started = subprocess.run(
        [COMMAND, place.file, "--passphrase-file", place.passphrase], capture_output=True, text=True, check=False
    )
    assert as_called("`paychan-signer encrypt FILE`", str(place.file)) in " ".join(started.stderr.split())

    assert run(place, "encrypt").status == 0

    assert place.seeds()[0].master == bytes.fromhex(HEX)
    assert "is encrypted already" in run(place, "encrypt").output
    assert run(place, "verify", "--hex", text=HEX).status == 0


def test_passphrase_is_changed_for_all_generations(place: Place) -> None:
    """The new passphrase opens the file, the old one does not; the output names a configured passphrase file to update."""
    recovered(place)
    new = private(place.file.with_name("new"), "another passphrase")
    assert run(place, "passphrase", "--new-passphrase-file", str(new)).status == 0
    assert place.seeds("another passphrase")[0].fingerprint == "73c5da0a"
    assert "wrong passphrase" in run(place, "verify", text=ABANDON).output

    private(place.passphrase, "another passphrase")
    beside = private(place.seed.with_suffix(".passphrase"), "another passphrase")
    new.write_text(WORD)
    result = call("passphrase", place.file, "--new-passphrase-file", new)
    assert f"Now write it to {beside}" in result.output


# --- destinations ----------------------------------------------------------------------------------------------------

COMMENTED = f"""# a comment
network = "regtest"   # no coins
[key]
mode = "hardened"
[settlement]  # where it goes
destination_address = "{ADDRESSES[0]}"  # the old wallet
"""


def test_rotated_destination_keeps_comments_and_the_old_address(place: Place) -> None:
    """The new address replaces the old one, the old one becomes a previous address, and all other text stays."""
    place.file.write_text(COMMENTED)
    place.file.chmod(0o640)

    result = call("rotate", "destination", place.file, ADDRESSES[1])

    assert "next start" in result.output
    expected = COMMENTED.replace(ADDRESSES[0], ADDRESSES[1]) + f'previous_addresses = ["{ADDRESSES[0]}"]\n'
    assert place.file.read_text() == expected
    assert stat.S_IMODE(place.file.stat().st_mode) == 0o640
    assert call("rotate", "destination", place.file, ADDRESSES[0]).status == 0
    config = commands.config_with_seed(place.file)
    assert config.settlement.destination_address == ADDRESSES[0]
    assert config.settlement.previous_addresses == (ADDRESSES[1],)


@pytest.mark.parametrize(
    "address",
    [
        "bcrt1qw508d6qejxtdg4y5r3zarvary0c5xw7kygt080",
        "bcrt1p0xlxvlhemja6c4dqv22uapctqupfhlxm9h8z3k2e72q4k9hcz7vqc8gma6",
        "BCRT1QW508D6QEJXTDG4Y5R3ZARVARY0C5XW7KYGT080",
    ],
)
def test_fault_43_the_destination_becomes_a_witness_address(place: Place, address: str) -> None:
    """`rotate destination` takes it; the earlier address stays allowed, and so does this one after the next change."""
    place.file.write_text(COMMENTED)
    assert call("rotate", "destination", place.file, address).status == 0
    assert call("rotate", "destination", place.file, ADDRESSES[1]).status == 0

    config = commands.config_with_seed(place.file)
    assert config.settlement.previous_addresses == (ADDRESSES[0], address)
    scripts = [each.script(CLIENT_KEY, EXPIRY) for each in config.previous_payouts]
    assert decode_address(address, Network.REGTEST) in scripts


def test_destination_is_set_for_the_first_time(place: Place) -> None:
    """From derived addresses to a configured one and back; derived ones are not listed."""
    assert call("rotate", "destination", place.file, ADDRESSES[1]).status == 0
    assert commands.config_with_seed(place.file).settlement.previous_addresses == ()
    assert call("rotate", "destination", place.file, "").status == 0
    settlement = commands.config_with_seed(place.file).settlement
    assert (settlement.destination_address, settlement.previous_addresses) == ("", (ADDRESSES[1],))


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("1M8iwBs5XD7ZJQJCDC7BdLEpSivRQZJ2Hg", "address of the regtest network"),
        (ADDRESSES[1][:-1], "wrong length or checksum"),
        (ADDRESSES[0], "has this value already"),
    ],
)
def test_wrong_destination_changes_nothing(place: Place, address: str, message: str) -> None:
    """An address of another network, a mistyped one, or the current one is refused."""
    place.file.write_text(COMMENTED)
    result = call("rotate", "destination", place.file, address)
    assert result.status == 2
    assert message in result.output
    assert place.file.read_text() == COMMENTED
    assert not place.file.with_name("signer.toml.new").exists()


# --- public keys -----------------------------------------------------------------------------------------------------


def test_pubkey_shows_each_generation(place: Place) -> None:
    """The server's key of a channel and its destination are shown for each seed, the newest first."""
    recovered(place)
    run(place, "recover", "--older", "--hex", text=HEX)

    result = run(place, "pubkey", CLIENT_KEY.hex(), "1900000000")

    settings = commands.config_with_seed(place.file)
    for tree in keystore.trees(settings, place.seeds())[:2]:
        assert tree.channel_key(CLIENT_KEY, 1_900_000_000, create=False).public_key.hex() in result.output
    assert result.output.index("73c5da0a") < result.output.index(place.seeds()[1].fingerprint)
    assert re.search(r"destination, live 1\w+ destination, test and regtest [mn]\w+", result.output)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("00", "1900000000"), "not a compressed public key"),
        (("05" + "11" * 32, "1900000000"), "not a compressed public key"),
        ((CLIENT_KEY.hex(), "1"), "not a lock time in Unix seconds"),
    ],
)
def test_pubkey_of_no_channel_is_refused(place: Place, arguments: tuple[str, str], message: str) -> None:
    """A wrong key or time is reported before the passphrase prompt."""
    assert message in call("pubkey", place.file, *arguments).output


def test_xpub_of_hardened_keys_says_that_it_derives_nothing(place: Place) -> None:
    """In hardened mode the extended keys of two branches are shown, with their use."""
    recovered(place)
    result = run(place, "export-xpub")
    assert re.findall(r"\[73c5da0a/(\d+)'\]tpub\w{107}", result.output) == ["1885562987", "1885562980"]
    assert "they lead to no address, channel key or coin" in result.output


def test_xpub_of_rbpcp_needs_an_explicit_option(tmp_path: Path) -> None:
    """In rbpcp-v2 mode the root's extended key is shown only with --i-know-what-this-reveals."""
    place = recovered(make_place(tmp_path, "rbpcp-v2"))

    refused = run(place, "export-xpub")
    shown = run(place, "export-xpub", "--i-know-what-this-reveals")

    assert refused.status == 2
    assert "pub6" not in refused.output
    assert "gives the root private key" in shown.output
    assert re.search(r"\[73c5da0a\]tpub\w{107}", shown.output)


# --- all commands ----------------------------------------------------------------------------------------------------

COMMANDS = [
    "run", "init", "recover", "verify", "encrypt", "passphrase", "forget", "pubkey", "export-xpub", "rotate seed",
    "rotate destination",
]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_no_secret_as_argument(command: str) -> None:
    """The help of every command has an example, and no command takes a passphrase, words or seed as argument."""
    text = call(*command.split(), "--help").output

    assert command == "run" or f"paychan-signer {command}" in text
    assert not re.search(r"--(passphrase|words|seed|pin) ", text)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be the wrong user")
def test_commands_are_run_as_the_user_who_owns_the_seed(tmp_path: Path) -> None:
    """If the signer runs as another user, a command as the wrong user is refused: the signer could not read its seed."""
    place = make_place(tmp_path, rest='[isolation]\nuser = "nobody"\n')
    result = run(place, "init", "--destination", "seed", "--words-file", str(tmp_path / "words"))
    assert result.status == 2
    assert "`sudo -u nobody paychan-signer …`" in result.output
