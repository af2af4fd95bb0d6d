"""Declared settings: reads a TOML text into one typed table, and documents that table.

Server and signer each declare their settings once, as msgspec structs. Each field holds type, default, unit and
description (`setting`). A section is a nested struct. Unknown keys, wrong types and values out of range are errors that
name source and key.
"""

from __future__ import annotations

import re
import tomllib
from typing import Any, NamedTuple, TypeVar, get_args, get_origin

import msgspec
from msgspec import Meta, Struct

T = TypeVar("T", bound=Struct)


class SettingsError(Exception):
    """An unusable configuration: its source, the key, and the reason."""

    def __init__(self, source: str, key: str, reason: str) -> None:
        super().__init__(f"{source}: {key}: {reason}" if key else f"{source}: {reason}")
        self.source, self.key, self.reason = source, key, reason


class Setting(NamedTuple):
    """One row of the documentation."""

    key: str
    kind: str
    default: str
    unit: str
    doc: str

    def shown(self, value: Any) -> str:
        """Show a value of this setting as TOML writes it."""
        return _show(value)


def setting(doc: str, unit: str = "", **limits: Any) -> Meta:
    """Describe a field of a declared table; `limits` are those of `msgspec.Meta`, such as `ge` and `le`."""
    return Meta(description=doc, extra={"unit": unit}, **limits)


def parse_settings(text: str, table: type[T], source: str) -> T:
    """Read TOML into the declared table.

    Raises:
        SettingsError: not TOML, or a key, type or value that the table does not declare.
    """
    try:
        return msgspec.convert(tomllib.loads(text), table)
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(source, "", f"not TOML: {error}") from None
    except msgspec.ValidationError as error:
        raise SettingsError(source, *_key_and_reason(str(error))) from None


def settings_table(table: type[Struct], prefix: str = "") -> list[Setting]:
    """List every key of a declared table in its order, sections as dotted prefixes."""
    rows: list[Setting] = []
    for field in msgspec.structs.fields(table):
        kind, meta = _unwrap(field.type)
        key = prefix + field.encode_name
        if _is_section(field.type):
            rows += settings_table(kind, key + ".")
            continue
        default = "required" if field.required else _show(field.default)
        unit = (meta.extra or {}).get("unit", "") if meta else ""
        rows.append(Setting(key, _kind_name(kind), default, unit, (meta.description or "") if meta else ""))
    return rows


def settings_values(config: Struct, prefix: str = "") -> dict[str, Any]:
    """Return the value of every key of a table, sections as dotted prefixes, in the order of `settings_table`."""
    values: dict[str, Any] = {}
    for field in msgspec.structs.fields(type(config)):
        value, key = getattr(config, field.name), prefix + field.encode_name
        values |= settings_values(value, key + ".") if _is_section(field.type) else {key: msgspec.to_builtins(value)}
    return values


def _is_section(annotation: Any) -> bool:
    kind, _ = _unwrap(annotation)
    return isinstance(kind, type) and issubclass(kind, Struct)


def _unwrap(annotation: Any) -> tuple[Any, Meta | None]:
    metadata = getattr(annotation, "__metadata__", ())
    return (annotation.__origin__, metadata[0]) if metadata else (annotation, None)


def _kind_name(kind: Any) -> str:
    if get_origin(kind) in (list, tuple):
        return f"list of {_kind_name(_unwrap(get_args(kind)[0])[0])}"
    values = getattr(kind, "__args__", None)
    return " | ".join(map(repr, values)) if values else getattr(kind, "__name__", str(kind))


def _show(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_show(each)}" for key, each in value.items()) + "}"
    if isinstance(value, tuple | list):
        return "[" + ", ".join(map(_show, value)) + "]"
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else repr(value).replace("'", '"')


def _key_and_reason(text: str) -> tuple[str, str]:
    """Split msgspec's sentence into the dotted key and the rest."""
    path = re.search(r" - at `\$\.?([^`]*)`$", text)
    section = path[1] if path else ""
    reason = text[: path.start()] if path else text
    unknown = re.search(r"unknown field `([^`]+)`", reason)
    missing = re.search(r"missing required field `([^`]+)`", reason)
    if unknown or missing:
        name = (unknown or missing)[1]  # type: ignore[index]
        return (f"{section}.{name}" if section else name), "unknown key" if unknown else "required, but not given"
    return section, reason
