"""Paths of requests: no spelling of a priced path is free."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paychan.gateway.paths import MAX_PATH_BYTES, PathTree, Pattern, segments
from paychan.gateway.prices import parse_prices
from paychan.protocol.errors import AmbiguousPath, NotForSale
from tests.lib.looped import looped

LIST = parse_prices(
    """
    upstream = "http://127.0.0.1:5000"
    free = ["/**"]
    [[route]]
    path = "/v1/tile/*"
    price_sat = 25
    [[route]]
    path = "/video/**"
    price_sat = 3
    [[route]]
    path = "/report@2.pdf"
    price_sat = 7
    [[route]]
    path = "/caf%c3%a9"
    price_sat = 9
    """,
    "test",
)
"""All that has no price is free: the list that forgives no wrong reading."""

AMBIGUOUS = (
    "/v1/./tile/5", "/v1/../v1/tile/5", "/x/../v1/tile/5", "/./v1/tile/5", "/v1/tile/..", "/v1/tile/.", "/..", "/.",
    "//v1/tile/5", "/v1//tile/5", "/v1/tile//5", "//", "/v1/tile/5//",
    "/v1%2ftile/5", "/v1%2Ftile/5", "/v1%5ctile/5", "/v1\\tile\\5",
    "/v1/%74ile/5", "/%761/tile/5", "/v1/til%65/5", "/v%31/tile/5", "/v1/tile/%2e", "/x/%2e%2e/v1/tile/5", "/v1%7e",
    "/v1/%2574ile/5", "/v1%252ftile/5",
    "/v1;x=1/tile/5", "/v1/tile;/5", "/v1/tile/5;jsessionid=1", "/v1%3b/tile/5", "/x/..;/v1/tile/5",
    "/v1/tile/5%00", "/v1/tile/5%0a", "/v1/tile/5%3fx", "/v1/tile%23", "/v1/tile%7f/5",
    "/v1%c0%aftile/5", "/v1/%c1%b4ile/5", "/%ff", "/%ed%a0%80",
    "/v1/tile/%", "/v1/tile/%4", "/v1/tile/%zz", "/v1/tile/%u0041",
    "/v1/ti le/5", "/v1/tile/5\t", "/v1/tile/5\r\n", "/v1/tile/5\x00", "/v1/tîle/5", '/v1/"tile/5', "/v1/<tile>/5",
    "/v1/tile/5?x", "/v1/tile/5#x", "/v1/[tile]/5", "/v1/{tile}/5", "/v1/tile|/5", "/v1/^tile/5", "/v1/`tile/5",
    "/%EF%BD%961/tile/5", "/v1%EF%BC%8Ftile/5", "/v1/%EF%BC%8E%EF%BC%8E/v1/tile/5", "/v1/t%C4%B0le/5/%EF%BC%85",
    "/v1./tile/5", "/v1/tile./5", "/v1/tile%20/5", "/v1/tile.%20./5", "/v1/.../tile/5", "/v1/tile/...", "/v1/tile/%20",
    "/cafe%CC%81", "/v1/ti%E2%84%93e/5", "/caf%C3%A9.",
    "", "v1/tile/5", "http://host/v1/tile/5", "*", "host:80", "/" + "x" * MAX_PATH_BYTES,
)  # fmt: skip


@looped("path", AMBIGUOUS, ids=lambda path: repr(path[:30]))
def test_a_path_that_two_programs_could_read_differently_is_refused(path: str) -> None:
    """Dot segments, empty segments, separators in other forms, needless encoding, and what is no path."""
    with pytest.raises(AmbiguousPath):
        LIST.find("GET", path)


@looped(
    ("path", "price"),
    [
        ("/v1/tile/5", 25), ("/v1/tile/5.", 25), ("/V1/Tile/5", 25), ("/v1/tile/5/", 25), ("/v1/tile/%C3%A9", 25), ("/v1/tile/*", 25),
        ("/v1/tile/.x", 25), ("/v1/tile/5%20", 25), ("/v1/tile/e%CC%81", 25), ("/video/%EF%BC%95", 3), ("/v1/tile/%2A", 25),
        ("/video", 3), ("/video/", 3), ("/video/a/b/c", 3), ("/VIDEO/a", 3), ("/video/**", 3),
        ("/report@2.pdf", 7), ("/report%402.pdf", 7), ("/caf%C3%A9", 9), ("/CAF%c3%a9", 9),
        ("/", 0), ("/v1", 0), ("/v1/tile", 0), ("/v1/tile/5/6", 0), ("/videos", 0), ("/x./y%20", 0), ("/%E6%97%A5%EF%BC%88", 0), ("/v1/tile5", 0),
    ],
)  # fmt: skip
def test_a_path_that_all_programs_read_alike_has_its_price(path: str, price: int) -> None:
    """Case, a slash at the end, and the encoding of other characters change no price."""
    assert LIST.find("GET", path).amount_sat == price


def test_an_unlisted_path_is_refused() -> None:
    """No request reaches the upstream without a decision of the seller."""
    prices = parse_prices('upstream = "http://h"\n[[route]]\npath = "/a"\nprice_sat = 1\n', "test")

    with pytest.raises(NotForSale):
        prices.find("GET", "/b")


@given(st.text(st.characters(max_codepoint=0x2FF), max_size=40), st.integers(0, 3))
def test_any_text_is_read_or_refused(text: str, dots: int) -> None:
    """No text raises another error, and a path that is read has no dot segment and no empty one."""
    try:
        parts = segments("/" + text + "/.." * dots)
    except AmbiguousPath:
        return
    assert dots == 0
    assert not {"", ".", ".."} & set(parts)


PARTS = st.lists(st.sampled_from(["a", "b", "*"]), max_size=3)
PATTERNS = st.builds(lambda parts, rest: Pattern("/" + "/".join([*parts, *["**"] * rest])), PARTS, st.booleans())
PATHS = st.lists(st.sampled_from(["a", "b", "c"]), max_size=4).map(tuple)


def matches(pattern: Pattern, path: tuple[str, ...]) -> bool:
    tree = PathTree[bool]()
    tree.add(pattern, True)
    return tree.matches(path) != []


@given(PATTERNS, PATTERNS, PATHS)
def test_overlaps_and_contains_say_what_matching_does(one: Pattern, other: Pattern, path: tuple[str, ...]) -> None:
    """A path that matches both shows an overlap; a path that only the inner one matches denies the containment."""
    if matches(one, path) and matches(other, path):
        assert one.overlaps(other)
        assert other.overlaps(one)
    if one.contains(other) and matches(other, path):
        assert matches(one, path)


@given(PATTERNS, PATTERNS)
def test_patterns_that_overlap_share_a_path(one: Pattern, other: Pattern) -> None:
    """`overlaps` is not said of patterns that share nothing."""
    letters = ("a", "b", "c")
    paths = [()]
    for _ in range(4):
        paths += [(*path, letter) for path in paths for letter in letters if len(path) < 4]
    assert one.overlaps(other) == any(matches(one, path) and matches(other, path) for path in set(paths))


@given(st.lists(PATTERNS, max_size=6, unique_by=lambda pattern: pattern.parts), PATHS)
def test_the_most_special_pattern_comes_first(patterns: list[Pattern], path: tuple[str, ...]) -> None:
    """Among patterns of which one contains the other, the contained one is found first."""
    nested: list[Pattern] = []
    for pattern in patterns:
        if all(not pattern.overlaps(o) or pattern.contains(o) or o.contains(pattern) for o in nested):
            nested.append(pattern)
    tree = PathTree[Pattern]()
    for pattern in nested:
        tree.add(pattern, pattern)

    found = tree.matches(path)

    assert {id(pattern) for pattern in found} == {id(pattern) for pattern in nested if matches(pattern, path)}
    assert all(outer.contains(inner) for inner, outer in itertools.pairwise(found))


@looped(
    "text",
    ["v1", "", "/a/**/b", "/a*", "/a/*.png", "/a//b", "/a/../b", "/a?b", "/%61", "/a.", "/a%20/b", "/cafe%CC%81"],
)
def test_texts_that_are_no_pattern(text: str) -> None:
    """A pattern is a path with `*` for whole segments, and `**` at its end."""
    with pytest.raises(ValueError, match=r"\S"):
        Pattern(text)
