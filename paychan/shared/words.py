"""BIP39: a seed as words that a person can write down. English, without BIP39's own passphrase.

Other wallets derive the same tree from the same words.
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from functools import cache

from mnemonic import Mnemonic

WORD_COUNTS = (12, 15, 18, 21, 24)

_SIGNIFICANT = 4
"""The first four letters identify each word of BIP39's list; some backups in steel have no more letters."""

_NEAR = 4
_SHOWN = 12


class WrongWords(Exception):
    """These words are no backup; the text names the wrong word and similar ones, and no other word of the backup."""


def to_words(entropy: bytes) -> list[str]:
    """Encode 16 to 32 bytes as 12 to 24 words."""
    return _list().to_mnemonic(entropy).split(" ")


def to_entropy(words: Sequence[str]) -> bytes:
    """Decode words to their bytes; four letters of a word are enough.

    Raises:
        WrongWords: an unknown word, a wrong number of words, or a wrong checksum.
    """
    whole = [_whole(number, word) for number, word in enumerate(words, 1)]
    if len(whole) not in WORD_COUNTS:
        msg = f"got {len(whole)} words, a backup has {', '.join(map(str, WORD_COUNTS[:-1]))} or {WORD_COUNTS[-1]}"
        raise WrongWords(msg)
    try:
        return bytes(_list().to_entropy(whole))
    except ValueError:
        msg = (
            "all words are known, but their checksum is wrong: one of them is not the word that was written down, "
            "or their order is different"
        )
        raise WrongWords(msg) from None


def to_seed(entropy: bytes) -> bytes:
    """Make BIP39's 64 bytes, the seed of BIP32's tree."""
    return Mnemonic.to_seed(" ".join(to_words(entropy)))


def find(word: str) -> str | None:
    """Return the word of the list that has these first four letters, or all of these letters."""
    text = word.strip().lower()
    known = _list().wordlist
    if text in known:
        return text
    longer = [each for each in known if each.startswith(text)] if len(text) >= _SIGNIFICANT else []
    return longer[0] if len(longer) == 1 else None


def near(word: str) -> list[str]:
    """Words that are spelled like an unknown one."""
    text = word.strip().lower()
    known = _list().wordlist
    close = get_close_matches(text, known, n=_NEAR, cutoff=0.6)
    return list(dict.fromkeys([*close, *(each for each in known if len(text) > 1 and each.startswith(text[:3]))]))[
        :_NEAR
    ]


def unknown(number: int, word: str) -> str:
    """Name a word that is not in the list, and similar words; do not show text that can't be a word, such as a key."""
    if not word.isalpha() or len(word) > _SHOWN:
        return f"word {number} is not one of the 2048 words, which have 3 to 8 letters"
    like = near(word)
    hint = f": perhaps {', '.join(like)}?" if like else ""
    return f'word {number}, "{word}", is not one of the 2048 words{hint}'


def _whole(number: int, word: str) -> str:
    found = find(word)
    if found is None:
        raise WrongWords(unknown(number, word))
    return found


@cache
def _list() -> Mnemonic:
    return Mnemonic("english")
