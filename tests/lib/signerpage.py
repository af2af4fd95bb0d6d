"""The page about the signer's socket, made from the message table. `python -m tests.lib.signerpage` writes it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

from msgspec import NODEFAULT, Struct
from msgspec import inspect as msgspec_inspect

from paychan.protocol.types import Sat, UnixTime
from paychan.protocol.wire import signer_messages as signerwire
from paychan.protocol.wire import signer_versions
from signer.config import Socket
from signer.judge import policies as policy
from signer.judge import validation as shape
from signer.server import connections
from tests.lib import signertext
from tests.lib.signerexample import EXAMPLE

PAGE = Path(__file__).parents[2] / "signer" / "PROTOCOL.md"

_LINE_BYTES = 48


def page() -> str:
    """Yield the sections of the page."""
    return "\n\n".join(f"{heading}\n\n{text}" for heading, text in _sections()) + "\n"


def _sections() -> Iterator[tuple[str, str]]:
    version = signer_versions.VERSION
    yield f"# The signer's socket, version {version}", signertext.INTRODUCTION
    yield "## Frames", signertext.FRAMES.format(version=version, least=2, most=f"{signerwire.MAX_FRAME_BYTES:,}")
    yield "## Versions", _versions()
    yield "## Values", signertext.VALUES
    yield "## Messages", _index()
    yield "## Requests", _all_described(requests())
    yield "## Replies", _all_described(replies())
    yield "## Structures", _all_described(structures())
    yield "## Signed transactions", signertext.SIGNED
    yield "## Certificates", signertext.CERTIFICATES
    yield "## Refusals", _tags()
    yield "## Order, deadlines and limits", _rules()
    yield "## Example", _example()


# --- the message table -----------------------------------------------------------------------------------------------


def requests() -> list[type[Struct]]:
    """Return all requests, by number."""
    return sorted(get_args(signerwire.Request), key=_number)


def replies() -> list[type[Struct]]:
    """Return all replies, by number."""
    return sorted(get_args(signerwire.Reply), key=_number)


def structures() -> list[type[Struct]]:
    """Return the structures within messages, outermost first, each once."""
    found: dict[type[Struct], None] = {}
    waiting = [*requests(), *replies()]
    while waiting:
        for field in _fields(waiting.pop(0)):
            for kind in _parts(field.type):
                if kind not in found and kind not in requests():
                    found[kind] = None
                    waiting.append(kind)
    return list(found)


def meaning(kind: type[Struct], name: str) -> str:
    """Return the meaning of a field. Raises KeyError for a field without a description."""
    if name == "id":
        return signertext.MEANINGS["request id" if kind in requests() else "reply id"]
    return signertext.MEANINGS[f"{kind.__name__}.{name}"]


def _number(kind: type[Struct]) -> int:
    number = kind.__struct_config__.tag
    assert isinstance(number, int)
    return number


def _fields(kind: type[Struct]) -> tuple[msgspec_inspect.Field, ...]:
    described = msgspec_inspect.type_info(kind)
    assert isinstance(described, msgspec_inspect.StructType)
    return described.fields


def _parts(kind: msgspec_inspect.Type) -> list[type[Struct]]:
    """Return the structures within a type, one level deep."""
    match kind:
        case msgspec_inspect.StructType():
            return [kind.cls]
        case msgspec_inspect.VarTupleType():
            return _parts(kind.item_type)
        case msgspec_inspect.UnionType():
            return [part for each in kind.types for part in _parts(each)]
    return []


# --- descriptions of messages ---------------------------------------------------------------------------------------


def _versions() -> str:
    rows = [f"| {number} | {text} |" for number, text in sorted(signer_versions.VERSIONS.items(), reverse=True)]
    return "\n".join(["| version | changes |", "|---|---|", *rows])


def _index() -> str:
    rows = []
    for request in requests():
        answer = next(kind for kind in replies() if _number(kind) == _number(request) + 100)
        rows.append(f"| {_number(request)} | {_link(request)} | {_number(answer)} | {_link(answer)} |")
    table = ["| number | request | number | reply |", "|---|---|---|---|", *rows]
    refusal = signerwire.Refusal
    return "\n".join(table) + f"\n\nA request may also be answered with {_number(refusal)}, {_link(refusal)}."


def _all_described(kinds: list[type[Struct]]) -> str:
    return "\n\n".join(_described(kind) for kind in kinds)


def _described(kind: type[Struct]) -> str:
    number = [f"| 0 | number | int | {_number(kind)} |"] if kind.__struct_config__.tag is not None else []
    hints = get_type_hints(kind)
    rows = [
        f"| {place} | {field.name} | {_type(field.type, hints[field.name])}{_default(field)} | {meaning(kind, field.name)} |"
        for place, field in enumerate(_fields(kind), len(number))
    ]
    table = ["| | field | type | meaning |", "|---|---|---|---|", *number, *rows]
    return f"### {kind.__name__}\n\n{_prose(kind)}\n\n" + "\n".join(table)


def _prose(kind: type[Struct]) -> str:
    """Return the first part of a docstring; the rest of a structure's docstring is about code."""
    text = inspect.getdoc(kind) or ""
    return text if kind.__struct_config__.tag is not None else text.split("\n\n")[0]


def _type(kind: msgspec_inspect.Type, hint: Any) -> str:
    match kind:
        case msgspec_inspect.StructType():
            return _link(kind.cls)
        case msgspec_inspect.VarTupleType():
            return f"array of {_type(kind.item_type, None)}"
        case msgspec_inspect.UnionType():
            return " or ".join(_type(each, None) for each in kind.types)
        case msgspec_inspect.BytesType():
            return "bytes" + _length(kind)
        case msgspec_inspect.IntType():
            return {Sat: "int, satoshi", UnixTime: "int, Unix seconds"}.get(hint, "int")
        case msgspec_inspect.StrType():
            return "text"
        case msgspec_inspect.BoolType():
            return "bool"
        case msgspec_inspect.NoneType():
            return "nil"
    raise NotImplementedError(kind)


def _length(kind: msgspec_inspect.BytesType) -> str:
    if kind.min_length is None:
        return ""
    return f", {kind.min_length}" + ("" if kind.min_length == kind.max_length else f" to {kind.max_length}")


def _default(field: msgspec_inspect.Field) -> str:
    if field.default is NODEFAULT:
        return ""
    shown = {None: "nil", (): "none"}.get(field.default, field.default)
    return f"; default {shown}"


def _link(kind: type[Struct]) -> str:
    return f"[{kind.__name__}](#{kind.__name__.lower()})"


# --- rules -----------------------------------------------------------------------------------------------------------


def tags() -> dict[str, str]:
    """Return all tags of refusals with their meaning."""
    of_rules = {tag: _rule(tag, inspect.getdoc(rule) or "") for tag, rule in policy.POLICIES}
    return {**of_rules, **dict(policy.OTHER_POLICIES), **signertext.PROTOCOL_TAGS}


def _rule(tag: str, doc: str) -> str:
    """Return the first sentence or paragraph of a rule's docstring, which begins with its tag."""
    assert doc.startswith(f"{tag}: "), doc
    return " ".join(doc.removeprefix(f"{tag}: ").split("\n\n")[0].removesuffix(".").split())


def _tags() -> str:
    rows = [f"| `{tag}` | {text} |" for tag, text in tags().items()]
    table = "\n".join(["| tag | rule |", "|---|---|", *rows])
    return f"The signer checks the rules in this order, and names the first one that a request breaks.\n\n{table}\n\n{signertext.PASSING}"


def _rules() -> str:
    socket = Socket()
    return signertext.RULES.format(
        request_seconds=f"{socket.request_seconds:g}",
        idle_seconds=f"{socket.idle_seconds:g}",
        connections=socket.max_connections,
        in_flight=connections.REQUESTS_IN_FLIGHT,
        bytes_in_flight=f"{connections.BYTES_IN_FLIGHT:,}",
        claims=signerwire.MAX_CLAIMS,
        coins=shape.MAX_COINS,
    )


# --- the example -----------------------------------------------------------------------------------------------------


def _example() -> str:
    parts = []
    for text, request, reply in EXAMPLE:
        asked, answered = signerwire.encode_frame(request), signerwire.encode_frame(reply)
        shown = (f"{type(each).__name__}\n{_hex(frame)}" for each, frame in ((request, asked), (reply, answered)))
        parts.append(f"{text}\n\n```\n" + "\n\n".join(shown) + "\n```")
    return "\n\n".join(parts)


def _hex(frame: bytes) -> str:
    """Format a frame: length, version and body apart; long bodies over several lines."""
    lines = [frame[at : at + _LINE_BYTES].hex() for at in range(5, len(frame), _LINE_BYTES)]
    return "\n".join(
        [f"{frame[:4].hex()} {frame[4:5].hex()} {lines[0]}", *(f"            {line}" for line in lines[1:])]
    )


def main() -> None:
    """Write the page."""
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
