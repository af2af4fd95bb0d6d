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


_TEN_YEARS = 10 * 366 * 24 * 3600
_MOST = {
    "seconds": _TEN_YEARS,
    "ms": _TEN_YEARS,
    "min": _TEN_YEARS // 60,
    "minutes": _TEN_YEARS // 60,
    "hours": _TEN_YEARS // 3600,
    "bytes": 1 << 40,
    "MB": 1_000_000_000,
    "sat": 21_000_000 * 100_000_000,
    "sat/vB": 1_000_000,
    "blocks": 1_000_000,
    "1/s": 1_000_000_000,
    "requests": 1_000_000_000,
}
"""By unit: the largest value of a setting that names none; a larger one is a slip of the keyboard."""

_MOST_ITEMS = 1_000_000_000
"""The largest number without a unit."""


def setting(doc: str, unit: str = "", **limits: Any) -> Meta:
    """Describe a field of a declared table; `limits` are those of `msgspec.Meta`, such as `ge` and `le`."""
    if "ge" in limits or "gt" in limits:
        limits = {"le": _MOST.get(unit, _MOST_ITEMS)} | limits
    return Meta(description=doc, extra={"unit": unit}, **limits)


_BYTE_ORDER_MARK = "\ufeff"
"""Some editors write it at the beginning of a file; it means nothing in UTF-8."""


def parse_settings(text: str, table: type[T], source: str) -> T:
    """Read TOML into the declared table.

    Raises:
        SettingsError: not TOML, or a key, type or value that the table does not declare.
    """
    try:
        tables = tomllib.loads(text.removeprefix(_BYTE_ORDER_MARK))
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(source, "", f"not TOML: {error}") from None
    try:
        return msgspec.convert(tables, table)
    except msgspec.ValidationError as error:
        raise SettingsError(source, *_key_and_reason(str(error), table, tables)) from None


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
    if isinstance(value, bool):
        return "true" if value else "false"
    return repr(value).replace("'", '"') if isinstance(value, str) else str(value)  # a date as TOML has it


def _key_and_reason(text: str, table: type[Struct], values: dict[str, Any]) -> tuple[str, str]:
    """Return the dotted key of msgspec's error, and a sentence with the value that was found and those that are valid."""
    path = re.search(r" - at `\$\.?([^`]*)`$", text)
    section = path[1] if path else ""
    reason = text[: path.start()] if path else text
    unknown = re.search(r"unknown field `([^`]+)`", reason)
    missing = re.search(r"missing required field `([^`]+)`", reason)
    if missing:
        key = _joined(section, missing[1])
        return key, "required, but not given" + _prefixed(": ", _valid(table, key))
    if unknown:
        names = ", ".join(field.encode_name for field in _fields(table, section))
        return _joined(section, unknown[1]), f"unknown key; {f'[{section}]' if section else 'the file'} has {names}"
    valid = _valid(table, section)
    return section, f"{_found(values, section)}: {valid}" if valid else reason


def _joined(section: str, name: str) -> str:
    return f"{section}.{name}" if section else name


def _prefixed(mark: str, text: str) -> str:
    return mark + text if text else ""


def _fields(table: type[Struct], section: str) -> tuple[msgspec.structs.FieldInfo, ...]:
    """Return the declared fields of a section; none if the path leads elsewhere."""
    for name in _names(section):
        found = next((field for field in msgspec.structs.fields(table) if field.encode_name == name), None)
        kind = _unwrap(found.type)[0] if found else None
        if get_origin(kind) in (list, tuple):
            kind = _unwrap(get_args(kind)[0])[0]
        if not (isinstance(kind, type) and issubclass(kind, Struct)):
            return ()
        table = kind
    return msgspec.structs.fields(table)


def _names(path: str) -> list[str]:
    """Split a dotted path into its keys, without the positions in lists."""
    return [name for name in re.sub(r"\[[^]]*\]", "", path).split(".") if name]


def _valid(table: type[Struct], key: str) -> str:
    """Return the valid values of a key in words; "" for a section, or an element that is no declared field."""
    names = _names(key)
    declared = _fields(table, ".".join(names[:-1])) if names else ()
    found = next((field for field in declared if field.encode_name == names[-1]), None)
    if found is None:
        return ""
    kind, meta = _unwrap(found.type)
    if get_origin(kind) in (list, tuple) and key.endswith("]"):
        kind, meta = _unwrap(get_args(kind)[0])
    return "want " + _wanted(kind, meta)


def _wanted(kind: Any, meta: Meta | None) -> str:
    kind = getattr(kind, "__supertype__", kind)
    if get_origin(kind) in (list, tuple):
        return "a list, such as [ ]"
    if isinstance(kind, type) and issubclass(kind, Struct):
        return "a table"
    if kind not in _KINDS:
        values = [f'"{value}"' for value in get_args(kind)]
        return " or ".join(filter(None, [", ".join(values[:-1]), values[-1]])) if values else _kind_name(kind)
    unit = (meta.extra or {}).get("unit", "") if meta else ""
    return _KINDS[kind] + _range(meta) + (f" ({unit})" if unit and kind in (int, float) else "")


def _range(meta: Meta | None) -> str:
    if meta is None:
        return ""
    least = f"from {meta.ge}" if meta.ge is not None else f"above {meta.gt}" if meta.gt is not None else ""
    return f" {least} to {meta.le}" if least and meta.le is not None else f" {least}" if least else ""


_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text in quotes"}


def _found(values: Any, key: str) -> str:
    """Return the value at a key as it stands in the file, as far as it is short."""
    for position, name in re.findall(r"\[(\d+)\]|([^.\[\]]+)", key):
        if isinstance(values, dict):
            values = values.get(name)
        else:
            values = values[int(position)] if position and isinstance(values, list) else None
    text = "a table" if isinstance(values, dict) else _show(values)
    return text if len(text) <= _LONGEST_SHOWN else text[:_LONGEST_SHOWN] + "…"


_LONGEST_SHOWN = 60
