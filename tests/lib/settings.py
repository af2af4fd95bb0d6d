"""Changes settings in the text of a TOML file, whether the file names them or leaves them at their default."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tomlkit


def with_settings(text: str, values: Mapping[str, Any]) -> str:
    """Set keys, such as `http.port`, in a TOML text; comments and other keys stay."""
    document = tomlkit.parse(text)
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        (document.setdefault(section, tomlkit.table()) if section else document)[name] = value
    return tomlkit.dumps(document)
