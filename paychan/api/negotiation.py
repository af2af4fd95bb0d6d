"""The choice between two media types by a client's `Accept` (RFC 9110 12.5.1)."""

from __future__ import annotations

import re

_QUALITY = re.compile(r"0(?:\.[0-9]{0,3})?|1(?:\.0{0,3})?")


def accepts_rather(accept: str, special: str, usual: str) -> bool:
    """Return whether a client names the special media type, and the usual one not with a higher quality.

    A range such as `*/*` asks for the usual one. A client that accepts neither gets the usual one: RFC 9110 12.4.1 lets a
    server "disregard the header field by treating the response as if it is not subject to content negotiation".
    """
    qualities = _qualities(accept)
    quality = qualities.get(special, 0.0)
    return quality > 0 and quality >= qualities.get(usual, 0.0)


def _qualities(accept: str) -> dict[str, float]:
    """Return the quality of each media type that `Accept` names (RFC 9110 12.4.2: "a value of 0 means "not acceptable"")."""
    found = {}
    for item in accept.lower().split(","):
        media, *parameters = (part.strip() for part in item.split(";"))
        named = next((part[2:].strip() for part in parameters if part.startswith("q=")), "1")
        found[media] = float(named) if _QUALITY.fullmatch(named) else 0.0
    return found
