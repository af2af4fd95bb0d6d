"""`paychan-signer init` asks where the earnings go, and the settings take the operator's own wallet."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from paychan.protocol.address import encode_address
from paychan.protocol.errors import Malformed
from paychan.protocol.types import Network
from signer.config import load_signer_config
from signer.keys.payout import GAP_LIMIT, Wallet, parse_payout
from tests.lib.pseudoterminal import PseudoTerminal
from tests.lib.signer_process import COMMAND
from tests.signer.place import ABANDON, Place, call, make_place, run

ADDRESS = "mm9mm96b8bZRBacaAvY5MEeDd6HW46qFcY"
OTHER = "mipcBbFg9gMiCh81Kj8tqqdgoZub1ZJRfn"

XPUB = "xpub6CatWdiZiodmUeTDp8LT5or8nmbKNcuyvz7WyksVFkKB4RHwCD3XyuvPEbvqAQY3rAPshWcMLoP2fMFMKHPJ4ZeZXYVUhLv1VMrjPC7PW6V"
ZPUB = "zpub6rFR7y4Q2AijBEqTUquhVz398htDFrtymD9xYYfG1m4wAcvPhXNfE3EfH1r1ADqtfSdVCToUG868RvUUkgDKf31mGDtKsAYz2oz2AGutZYs"
"""BIP84's test vector: its account, whose first receiving address is known."""
TPUB = "tpubD6NzVbkrYhZ4XgiXtGrdW5XDAPFCL9h7we1vwNCpn8tGbBcgfVYjXyhWo4E1xkh56hjod1RhGjxbaTLV3X4FyWuejifB9jusQ46QzG87VKp"
DESCRIPTOR = f"wpkh([73c5da0a/84h/1h/0h]{TPUB}/0/*)"


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return make_place(tmp_path)


def named(place: Place) -> str:
    return load_signer_config(place.file).settlement.destination_address


@pytest.mark.parametrize("destination", [ADDRESS, DESCRIPTOR, "seed"])
def test_fault_47_init_takes_a_destination(place: Place, destination: str) -> None:
    """An option answers the question: address and descriptor come into the file, the seed's addresses need no entry."""
    words = str(place.file.with_name("words"))
    result = run(place, "init", "--words-file", words, "--destination", destination)

    assert result.status == 0, result.output
    assert named(place) == ("" if destination == "seed" else destination)
    assert ("sweep" if destination == "seed" else f"Earnings go to {destination}") in result.output


def test_fault_47_init_without_an_answer_makes_no_seed(place: Place) -> None:
    """A script must say where the earnings go: nothing is decided silently."""
    before = place.file.read_text()
    result = run(place, "init", "--words-file", str(place.file.with_name("words")))

    assert result.status == 2
    assert "--destination" in result.output
    assert not place.seed.exists()
    assert not place.file.with_name("words").exists()
    assert place.file.read_text() == before


WRONG = {
    "1M8iwBs5XD7ZJQJCDC7BdLEpSivRQZJ2Hg": "network",
    ADDRESS[:-1]: "checksum",
    "": "where do the earnings go",
    "tpub0": "neither base58 nor bech32",
    TPUB: "does not name the type of the addresses",
    f"wpkh({XPUB}/0/*)": "no extended key of the regtest network",
    f"wpkh({TPUB[:-1]}x/0/*)": "wrong length or checksum",
    f"wpkh({TPUB}/0/*)#qqqqqqqq": "the descriptor's checksum is qqqqqqqq, want ",
    f"wpkh({TPUB}/0h/*)": "want an address, or a descriptor",
    f"wpkh({TPUB}/0)": "want an address, or a descriptor",
    f"sh(wpkh({TPUB}/0/*)": "want an address, or a descriptor",
    f"wpkh({TPUB}/0/*))": "want an address, or a descriptor",
    f"wsh(multi(1,{TPUB}/0/*))": "want an address, or a descriptor",
    f"wpkh(tprv{TPUB[4:]}/0/*)": "this is a private key",
    f"wpkh({TPUB}/4294967296/*)": "hardened",
    f"wpkh({TPUB}/1/*)": "addresses for change",
    f"wpkh({TPUB}/<1;0>/*)": "addresses for change",
    "wpkh(02" + "11" * 32 + "/0/*)": "no extended public key",
}


@pytest.mark.parametrize("text", WRONG, ids=lambda text: text[:40] or "nothing")
def test_fault_47_a_wrong_destination_is_named(place: Place, text: str) -> None:
    """The reason is said, at the question as in the configuration, and no seed is made."""
    result = run(place, "init", "--words-file", str(place.file.with_name("words")), "--destination", text)

    assert result.status == 2
    assert WRONG[text] in result.output
    assert not place.seed.exists()
    if text and WRONG[text] != "addresses for change":  # a file of an earlier release may have it
        place.file.write_text(place.file.read_text() + f"[settlement]\ndestination_address = '{text}'\n")
        assert f"settlement.destination_address: {WRONG[text]}"[:20] in run(place, "verify").output
        assert WRONG[text] in run(place, "verify").output


def test_a_destination_in_the_file_is_kept(place: Place) -> None:
    """A file that names one is not asked about; another one is a matter of `rotate destination`."""
    place.file.write_text(place.file.read_text() + f'[settlement]\ndestination_address = "{ADDRESS}"\n')
    words = str(place.file.with_name("words"))

    assert "rotate destination" in run(place, "init", "--words-file", words, "--destination", OTHER).output
    assert run(place, "init", "--words-file", words).status == 0
    assert named(place) == ADDRESS
    assert call("rotate", "destination", place.file, DESCRIPTOR).status == 0
    assert load_signer_config(place.file).settlement.previous_addresses == (ADDRESS,)
    assert call("rotate", "destination", place.file, OTHER).status == 0
    assert load_signer_config(place.file).settlement.previous_addresses == (ADDRESS, DESCRIPTOR)


@pytest.mark.parametrize("command", ["init", "recover"])
def test_the_first_address_of_a_wallet_is_shown_to_a_script(place: Place, command: str) -> None:
    """The first address of a descriptor is shown without a terminal too, by `init`, `recover` and `rotate`."""
    wallet = parse_payout(DESCRIPTOR, Network.REGTEST)
    assert isinstance(wallet, Wallet)
    first = f"first receiving address is {encode_address(wallet.at(0), Network.REGTEST)}"
    words = [] if command == "recover" else ["--words-file", str(place.file.with_name("words"))]

    assert first in run(place, command, *words, "--destination", DESCRIPTOR, text=ABANDON).output
    assert named(place) == DESCRIPTOR
    assert call("rotate", "destination", place.file, ADDRESS).status == 0
    assert first in call("rotate", "destination", place.file, DESCRIPTOR).output


def test_yes_in_any_form_is_a_yes(place: Place) -> None:
    """A "y" confirms the first address."""
    words = str(place.file.with_name("words"))
    order = ["init", place.file, "--words-file", words, "--passphrase-file", place.passphrase]
    with PseudoTerminal([COMMAND, *order]) as terminal:
        terminal.read_until("Destination: ")
        terminal.enter(DESCRIPTOR)
        terminal.read_until(r"yes or\s+no: ")
        terminal.enter("Y")
        terminal.read_until("Created")

    assert named(place) == DESCRIPTOR


def test_seed_is_a_destination_in_any_case(place: Place) -> None:
    """`seed` leads back to derived addresses and keeps the earlier destinations; a wrong word names all places."""
    words = str(place.file.with_name("words"))
    for order in (
        ("init", place.file, "--words-file", words, "--destination", "derived"),
        ("rotate", "destination", place.file, "derived"),
    ):
        output = call(*order).output
        assert "an address, a descriptor" in output
        assert '"seed"' in output
    assert run(place, "init", "--words-file", words, "--destination", "SEED").status == 0
    assert named(place) == ""
    for destination in (ADDRESS, DESCRIPTOR, "Seed"):
        assert call("rotate", "destination", place.file, destination).status == 0
    settlement = load_signer_config(place.file).settlement
    assert settlement.destination_address == ""
    assert settlement.previous_addresses == (ADDRESS, DESCRIPTOR)
    assert "has this value already" in call("rotate", "destination", place.file, "seed").output
    place.file.write_text(place.file.read_text().replace('destination_address = ""', 'destination_address = "seed"'))
    assert 'write "" for addresses derived from the seed' in run(place, "verify").output


def test_recover_keeps_the_destination_of_the_file(place: Place) -> None:
    """A script that recovers is not asked; --older changes no destination."""
    assert "Earnings go to addresses of the seed" in run(place, "recover", text=ABANDON).output
    assert "rotate destination" in run(place, "recover", "--older", "--destination", ADDRESS, text=ABANDON).output
    assert named(place) == ""


def test_fault_47_init_asks_on_a_terminal(place: Place) -> None:
    """A wrong answer is asked about again; of a wallet, the first address is shown and must be confirmed."""
    wallet = parse_payout(DESCRIPTOR, Network.REGTEST)
    assert isinstance(wallet, Wallet)
    first = encode_address(wallet.at(0), Network.REGTEST)
    words = str(place.file.with_name("words"))
    order = ["init", place.file, "--words-file", words, "--passphrase-file", place.passphrase]
    with PseudoTerminal([COMMAND, *order]) as terminal:
        terminal.read_until("Where do the earnings go.*Destination: ")
        terminal.enter("somewhere else")
        terminal.read_until("neither base58.*Destination: ")
        terminal.enter(DESCRIPTOR)
        terminal.read_until(f"Is {first} the first receiving address of your wallet.*: ")
        terminal.enter("perhaps")
        terminal.read_until("Type yes or no.*: ")
        terminal.enter("N")
        terminal.read_until("Destination: ")
        assert not place.seed.exists()
        terminal.enter(ADDRESS)
        terminal.read_until("Created")

    assert named(place) == ADDRESS


def test_fault_47_an_end_of_input_at_the_question_makes_no_seed(place: Place) -> None:
    """Control-D leaves everything as it was."""
    order = ["init", place.file, "--words-file", str(place.file.with_name("words"))]
    with PseudoTerminal([COMMAND, *order]) as terminal:
        terminal.read_until("Destination: ")
        os.write(terminal._terminal, b"\x04")
        assert terminal.wait() == 2

    assert not place.seed.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs a directory that this user can't make, for root a file")
def test_no_words_are_shown_for_a_seed_that_can_not_be_written(place: Place) -> None:
    """The directory is made first: the operator writes down no words in vain."""
    (place.file.with_name("file")).touch()
    text = place.file.read_text().replace(
        f'state_dir = "{place.file.parent}"', f'state_dir = "{place.file.parent}/file/state"'
    )
    place.file.write_text(text)
    result = run(place, "init", "--words-file", str(place.file.with_name("words")), "--destination", "seed")

    assert result.status == 2
    assert "can't make" in result.output
    assert not place.file.with_name("words").exists()


def test_an_account_of_bip84_has_its_addresses() -> None:
    """BIP84's own vector: m/84'/0'/0'/0/0 and the next one."""
    wallet = parse_payout(ZPUB, Network.LIVE)
    assert isinstance(wallet, Wallet)

    assert encode_address(wallet.at(0), Network.LIVE) == "bc1qcr8te4kr609gcawutmrza0j4xv80jy8z306fyu"
    assert encode_address(wallet.at(1), Network.LIVE) == "bc1qnjg0jd8228aq7egyzacy8cys3knf9xvrerkf9g"


def test_channels_share_the_first_addresses_of_a_wallet() -> None:
    """Each channel's place follows from its key and expiry; every wallet looks at the first 20 addresses (BIP44)."""
    wallet = parse_payout(DESCRIPTOR, Network.REGTEST)
    assert isinstance(wallet, Wallet)
    first = {wallet.at(index) for index in range(GAP_LIMIT)}
    channels = [(bytes([2]) + number.to_bytes(32, "big"), 1_900_000_000 + number) for number in range(400)]

    assert {wallet.script(*channel) for channel in channels} == first
    assert wallet.script(*channels[7]) == wallet.script(*channels[7])


def test_a_private_key_is_never_repeated_in_an_error(place: Place) -> None:
    """An extended private key that was pasted by mistake is refused without being shown."""
    key, words = f"tprv{TPUB[4:]}", place.file.with_name("words")
    with pytest.raises(Malformed) as refused:
        parse_payout(key, Network.REGTEST)

    assert "private key" in str(refused.value)
    assert TPUB[4:] not in str(refused.value)
    for order in (
        ("init", place.file, "--words-file", words, "--destination", key),
        ("rotate", "destination", place.file, key),
    ):
        result = call(*order)
        assert "private key" in result.output
        assert TPUB[4:] not in result.output
