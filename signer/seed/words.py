"""BIP39: a seed as words that a person can write down. English, without BIP39's own passphrase.

So other wallets with the same words derive the same tree.
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from functools import cache

from mnemonic import Mnemonic

WORD_COUNTS = (12, 15, 18, 21, 24)

_SIGNIFICANT = 4
"""The first four letters tell each word of BIP39's list from all others; some backups in steel have no more."""

_NEAR = 4
_SHOWN = 12


class WrongWords(Exception):
    """These words are no backup: which one, and what it may have been. Holds no other word of them."""


def to_words(entropy: bytes) -> list[str]:
    """Write 16 to 32 bytes as 12 to 24 words."""
    return _list().to_mnemonic(entropy).split(" ")


def to_entropy(words: Sequence[str]) -> bytes:
    """Read words as the bytes that they stand for; four letters of a word are enough.

    Raises:
        WrongWords: an unknown word, a wrong number of them, or a wrong checksum.
    """
    whole = [_whole(number, word) for number, word in enumerate(words, 1)]
    if len(whole) not in WORD_COUNTS:
        msg = f"got {len(whole)} words, a backup has {', '.join(map(str, WORD_COUNTS[:-1]))} or {WORD_COUNTS[-1]}"
        raise WrongWords(msg)
    try:
        return bytes(_list().to_entropy(whole))
    except ValueError:
        msg = (
            "all words are known, but their checksum is wrong: one is another word than was written down, "
            "or their order is another"
        )
        raise WrongWords(msg) from None


def to_seed(entropy: bytes) -> bytes:
    """Make BIP39's 64 bytes, from which BIP32's tree grows."""
    return Mnemonic.to_seed(" ".join(to_words(entropy)))


def find(word: str) -> str | None:
    """Return the word that is meant, from four letters or all of them."""
    text = word.strip().lower()
    known = _list().wordlist
    if text in known:
        return text
    longer = [each for each in known if each.startswith(text)] if len(text) >= _SIGNIFICANT else []
    return longer[0] if len(longer) == 1 else None


def near(word: str) -> list[str]:
    """Words that are written much like an unknown one."""
    text = word.strip().lower()
    known = _list().wordlist
    close = get_close_matches(text, known, n=_NEAR, cutoff=0.6)
    return list(dict.fromkeys([*close, *(each for each in known if len(text) > 1 and each.startswith(text[:3]))]))[
        :_NEAR
    ]


def unknown(number: int, word: str) -> str:
    """Say which word is in no list, and what it may have been; what can be no word, such as a key, is not shown."""
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
