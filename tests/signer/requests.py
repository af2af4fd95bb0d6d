"""Requests with all kinds of damage, for Hypothesis."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
from hypothesis import strategies as st

from paychan.protocol.wire.signer_messages import SettlementRequest
from signer.keys.ring import KeyRing
from tests.signer.messages import CLIENT_KEY, make_request, make_reserve_request, mutated


def leaves(value: Any, path: str = "") -> Iterator[str]:
    """Paths of all fields of a request that are not structures."""
    if isinstance(value, tuple):
        named = [(str(index), item) for index, item in enumerate(value)]
    elif isinstance(value, msgspec.Struct):
        named = [(name, getattr(value, name)) for name in value.__struct_fields__]
    else:
        yield path
        return
    for name, item in named:
        yield from leaves(item, f"{path}.{name}" if path else name)


INTEGERS = st.one_of(st.integers(-(1 << 63), (1 << 64) - 1), st.integers(-2, 1_000_001), st.sampled_from([0x82, 0x83]))
"""All integers of msgpack, and those near the limits."""


@st.composite
def damaged_requests(draw: st.DrawFn, keys: KeyRing) -> SettlementRequest:
    """A valid request with up to four fields replaced by values that the decoder accepts; it accepts no other kind."""
    make = draw(st.sampled_from([make_request, make_reserve_request]))
    request = make(keys, drained=draw(st.integers(0, 2)))
    paths = sorted(path for path in leaves(request) if path != "reserve" and not path.endswith(".tag"))
    for path in draw(st.lists(st.sampled_from(paths), max_size=4)):
        if isinstance(_value(request, path), int):
            new: Any = draw(INTEGERS)
        elif path.endswith("_key"):
            new = draw(st.one_of(st.binary(min_size=33, max_size=33), st.just(CLIENT_KEY)))
        elif path.endswith("signature"):
            new = draw(st.binary(min_size=8, max_size=72))
        else:
            new = draw(st.binary(max_size=300))
        request = mutated(request, path, new)
    return request


def _value(request: Any, path: str) -> Any:
    for name in path.split("."):
        request = request[int(name)] if isinstance(request, tuple) else getattr(request, name)
    return request
