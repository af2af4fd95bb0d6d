"""The recipes of `CONTRIBUTING.md`: checks that a recipe promises and that no other test has."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args, get_type_hints

from paychan.api import v1, v2
from paychan.api.management import handlers as management
from paychan.api.stream import handler as stream
from paychan.config import Chain
from tests.api.test_cors import PATHS
from tests.contract.chains import WORLDS
from tests.lib.looped import looped

PAGE = Path(__file__).parents[2] / "paychan" / "api" / "README.md"
SAMPLES = {"txid": "0" * 64, "vout": "0", "expiry": "1500000000", "client_pubkey": "02" + "11" * 32}
PUBLIC = [pattern for pattern, _ in (*v1.ROUTES, *v2.ROUTES)]
EVERY = [*PUBLIC, *(pattern for pattern, _ in (*stream.ROUTES, *management.ROUTES) if pattern != r".*")]


def choices(kind: type, field: str) -> set[str]:
    """The allowed values of a setting."""
    literal, *_ = get_args(get_type_hints(kind, include_extras=True)[field])
    return set(get_args(literal))


def documented() -> set[str]:
    """The paths of the API page, with samples for names, and with and without each optional end."""
    paths: set[str] = set()
    for found in re.findall(r"`(?:[A-Z]+ )?(/[^`?\s]*)[^`]*`", PAGE.read_text()):
        path = re.sub(r"\{(\w+)\}", lambda name: SAMPLES.get(name[1], name[0]), found)
        paths |= {re.sub(r"\[[^\]]*\]", "", path), re.sub(r"[\[\]]", "", path)}
    return paths


@looped("pattern", EVERY)
def test_every_route_is_in_the_page(pattern: str) -> None:
    """paychan/api/README.md names each route of clients and operator."""
    assert any(re.fullmatch(pattern, path) for path in documented())


@looped("pattern", PUBLIC)
def test_every_public_route_is_tried_by_pages_of_other_sites(pattern: str) -> None:
    """The tests of CORS request every route of both versions."""
    assert any(re.fullmatch(pattern, path) for path in PATHS)


def test_every_chain_backend_is_held_to_the_contract() -> None:
    """Each backend of a real chain has a world in the contract suite."""
    assert {name.partition("-")[0] for name in WORLDS} == choices(Chain, "backend") - {"debug"}
