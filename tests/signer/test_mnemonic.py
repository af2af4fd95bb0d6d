"""Words for a seed: those of BIP39, and the errors for other words."""

from __future__ import annotations

import json
from pathlib import Path

import bitcoin.base58
import pytest
from bitcoin.core import Hash
from hypothesis import given
from hypothesis import strategies as st

from paychan.protocol.keytree import Node
from paychan.protocol.types import Network
from paychan.shared import words as mnemonic
from paychan.shared.words import WrongWords, near, to_entropy, to_seed, to_words
from signer.cli.pubkey import extended_key
from tests.lib.looped import looped

VECTORS = json.loads(Path(__file__).with_name("bip39_vectors.json").read_text())
ROOT = VECTORS["root"]


@looped(("entropy", "words"), VECTORS["cases"])
def test_words_are_those_of_bip39(entropy: str, words: str) -> None:
    """Entropy and words of the published vectors are converted to each other."""
    assert " ".join(to_words(bytes.fromhex(entropy))) == words
    assert to_entropy(words.split()).hex() == entropy


def test_tree_is_that_of_other_wallets() -> None:
    """Words give the root key that BIP86 publishes for them, private and public."""
    root = Node.from_seed(to_seed(to_entropy(ROOT["words"].split())))

    raw = bytes(bitcoin.base58.decode(ROOT["xprv"]))
    assert Hash(raw[:78])[:4] == raw[78:]
    assert (root.chain_code, root.key.secret) == (raw[13:45], raw[46:78])
    assert extended_key(root, (), Network.LIVE) == ROOT["xpub"]


@given(st.sampled_from([16, 20, 24, 28, 32]).flatmap(lambda size: st.binary(min_size=size, max_size=size)))
def test_every_entropy_comes_back(entropy: bytes) -> None:
    """Any entropy is read back from its words, in capitals too, and from four letters of each."""
    words = to_words(entropy)

    assert len(words) in mnemonic.WORD_COUNTS
    assert to_entropy(words) == to_entropy([word.upper() for word in words]) == entropy
    assert to_entropy([word[:4] for word in words]) == entropy


@looped(("wrong", "like"), [("abandom", "abandon"), ("abuot", "about"), ("lettre", "letter"), ("yelow", "yellow")])
def test_wrong_word_is_named_with_its_neighbours(wrong: str, like: str) -> None:
    """The first unknown word is named with its number and similar words."""
    words = [*["abandon"] * 6, wrong, *["abandon"] * 5]

    with pytest.raises(WrongWords, match=rf'word 7, "{wrong}", .*perhaps .*{like}'):
        to_entropy(words)
    assert like in near(wrong)


@looped("word", ["00112233445566778899aabbccddeeff", "abandonabandonabandon", "", "ab1", "кошка" * 3])
def test_text_that_is_no_word_is_not_shown(word: str) -> None:
    """Text that can't be a word, such as a key in the wrong place, is refused without being shown."""
    with pytest.raises(WrongWords, match="word 1 is not one of the 2048 words") as refused:
        to_entropy([word] * 12)
    assert not word or word not in str(refused.value)


@looped("count", [0, 1, 11, 13, 23, 25])
def test_wrong_number_of_words_is_refused(count: int) -> None:
    """Both numbers are in the refusal."""
    with pytest.raises(WrongWords, match=f"got {count} words, a backup has 12, 15, 18, 21 or 24"):
        to_entropy(["zoo"] * count)


def test_checksum_finds_a_known_word_in_a_wrong_place() -> None:
    """One wrong word, or two swapped words, is found by the checksum, and no word is shown."""
    words = [
        "letter",
        "advice",
        "cage",
        "absurd",
        "amount",
        "doctor",
        "acoustic",
        "avoid",
        "letter",
        "advice",
        "cage",
        "above",
    ]
    for changed in ([*words[:-1], "zebra"], [words[1], words[0], *words[2:]]):
        with pytest.raises(WrongWords, match="checksum is wrong") as refused:
            to_entropy(changed)
        assert not set(words) & set(str(refused.value).replace(",", "").split())
