"""The tree of refusals: one table of stable codes, all of them in use, with texts that contain the numbers."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path
from string import Formatter

import pytest

from paychan.protocol import errors, unpaid
from paychan.protocol.errors import (
    BadRequest,
    Conflict,
    Failed,
    Gone,
    Moved,
    NotFound,
    PaychanError,
    PaymentShort,
    Unavailable,
    Unpaid,
    ValueBackwards,
)
from tests.lib.looped import looped

ROOT = Path(__file__).parents[2]
LEAVES = list(PaychanError.table.values())
STATUS = {
    Moved: 308,
    BadRequest: 400,
    Unpaid: 402,
    NotFound: 404,
    Conflict: 409,
    Gone: 410,
    Failed: 500,
    Unavailable: 503,
}
SPECIAL = {
    "body_too_large": 413,
    "request_line_too_long": 414,
    "head_too_large": 431,
    "too_many_payments": 413,
    "method_not_allowed": 405,
    "unauthorized": 401,
    "merchant_token_wrong": 401,
    "too_many_requests": 429,
    "misdirected": 421,
    "cross_site": 403,
    "too_many_bad_signatures": 429,
    "upstream_failed": 502,
}

each_leaf = looped("leaf", LEAVES, ids=lambda leaf: leaf.code)


def fields_of(leaf: type[PaychanError]) -> dict[str, int]:
    """A different number for each field in the text of a refusal."""
    names = [name for _, name, _, _ in Formatter().parse(leaf.text) if name]
    return {name: 131 + 7 * place for place, name in enumerate(names)}


@each_leaf
def test_the_text_holds_every_field(leaf: type[PaychanError]) -> None:
    """The text of a refusal contains both of its numbers."""
    fields = fields_of(leaf)
    refusal = leaf(**fields)

    for number in fields.values():
        assert str(number) in str(refusal) or f"0x{number:02x}" in str(refusal)
    assert refusal.fields == fields
    assert "{" not in str(refusal)


@each_leaf
def test_a_compared_number_has_its_partner(leaf: type[PaychanError]) -> None:
    """A text with a received number also has the needed number or the limit."""
    names = set(fields_of(leaf))

    assert any(name.startswith(("need", "want", "limit")) for name in names) or not any(
        name.startswith("got_") for name in names
    )


@each_leaf
def test_codes_and_statuses(leaf: type[PaychanError]) -> None:
    """A code is lower-case words; its status is that of its branch, except for codes with a special HTTP status."""
    branch = leaf.__mro__[1]

    assert re.fullmatch(r"[a-z]+(_[a-z]+)*", leaf.code)
    assert leaf.http_status == SPECIAL.get(leaf.code, STATUS[branch])


def test_a_code_can_not_be_used_twice() -> None:
    """The class statement itself refuses a code that is already used, and does not change the table."""
    with pytest.raises(TypeError, match="'payment_short' is used twice"):
        type("Copy", (BadRequest,), {"code": "payment_short"})

    assert PaychanError.table["payment_short"] is PaymentShort


def test_every_class_is_a_branch_or_in_the_table() -> None:
    """Every refusal has a code."""
    names = (*vars(errors).values(), *vars(unpaid).values())
    classes = {c for c in names if isinstance(c, type) and issubclass(c, PaychanError)}

    assert classes == {PaychanError, *STATUS, *LEAVES}
    assert len({leaf.code for leaf in LEAVES}) == len(LEAVES)


@each_leaf
def test_every_refusal_is_given_somewhere(leaf: type[PaychanError]) -> None:
    """The programs use every code: clients would wait for an unused code in vain."""
    assert leaf.__name__ in names_in_use()


@cache
def names_in_use() -> set[str]:
    """Names that the programs use, except in imports and in the table itself."""
    modules = (path for package in ("paychan", "actors", "signer") for path in (ROOT / package).rglob("*.py"))
    return {
        node.id
        for path in modules
        if path not in (Path(errors.__file__), Path(unpaid.__file__))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Name)
    }


def test_the_tree_in_the_docstring() -> None:
    """The drawing names every branch with its status."""
    drawn = dict(re.findall(r"[├└]── (\w+) +(\d{3})", errors.__doc__ or ""))

    assert drawn == {branch.__name__: str(status) for branch, status in STATUS.items()}


def test_refusals_are_compared_by_kind_and_fields() -> None:
    """Two refusals are equal if their class and fields are equal."""
    assert PaymentShort(got_sat=1, need_sat=2) == PaymentShort(got_sat=1, need_sat=2)
    assert PaymentShort(got_sat=1, need_sat=2) != PaymentShort(got_sat=1, need_sat=3)
    assert PaymentShort(got_sat=1, need_sat=2) != ValueBackwards(got_sat=1, need_sat=2)
