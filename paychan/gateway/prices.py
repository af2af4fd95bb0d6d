"""The price list: from a TOML text to the route of a request, with everything that the route decides.

`PriceList.find` is asked for every request, before anything else is done for it. A path that the list does not name is
refused: no request reaches an upstream without a decision of the seller.
"""

from __future__ import annotations

import re

from msgspec import Struct

from paychan.gateway.paths import PathTree, Pattern, other_readings, segments
from paychan.gateway.pricefile import Answers, FreeAllowance, PriceFile, RouteTable, Timeouts
from paychan.protocol.errors import AmbiguousPath, MethodNotAllowed, NotForSale
from paychan.protocol.settings import SettingsError, parse_settings
from paychan.protocol.types import Sat
from paychan.shared.urls import url_trouble

METERED = frozenset({"byte", "kilobyte", "second", "event"})
"""Units that the gateway counts while an answer passes through it."""

_CACHED_ROUTES = 8192
"""Requests whose route is remembered; about 2 MB. Longer paths than `_CACHED_PATH` are looked up each time."""

_CACHED_PATH = 200

_NOT_ONE_LINE = re.compile(r"[\x00-\x1f\x7f]")
_METHOD = re.compile(r"[A-Z]+")
_STATUS = re.compile(r"[1-5](xx|[0-9]{2})")
_REALM = re.compile(r"[A-Za-z0-9][A-Za-z0-9.:_ /-]{0,99}")
_MIME = re.compile(r"[a-z0-9.+-]+/[a-z0-9.+-]+")


class Route(Struct, frozen=True, kw_only=True, eq=False):
    """Everything that the price list says about a request. `amount_sat` is 0 on a free path."""

    path: str
    """The pattern, as the price list has it."""
    methods: tuple[str, ...]
    """Upper case; empty: all methods that no other route of this path names."""
    unit: str
    amount_sat: Sat
    """Price of one unit, or the ceiling if `is_ceiling`."""
    is_ceiling: bool
    """Whether the upstream says the price in its answer, at most `amount_sat`."""
    realm: str
    """Name of the service; "" if it is the host of each request."""
    description: str
    mime_type: str
    upstream: str
    """Base URL without a slash at the end."""
    timeouts: Timeouts
    pause_seconds: float
    gives_back: frozenset[int]
    """Statuses of the upstream that give the price back; a connect error and a time-out always do."""

    @property
    def is_free(self) -> bool:
        return self.amount_sat == 0

    @property
    def is_metered(self) -> bool:
        """Whether the gateway charges unit by unit while the answer passes."""
        return self.unit in METERED

    @property
    def name(self) -> str:
        """Name for logs, such as `GET,HEAD /v1/tile/*`."""
        return f"{','.join(self.methods) or '*'} {self.path}"


class _Place(Struct):
    """All routes of one pattern."""

    by_method: dict[str, Route]
    others: Route | None = None

    def route(self, method: str) -> Route | None:
        found = self.by_method.get(method)
        if found is None and method == "HEAD":
            found = self.by_method.get("GET")
        return found or self.others


class PriceList:
    """A checked price list. It never changes; a changed file is a new list."""

    def __init__(self, file: PriceFile, source: str) -> None:
        """Check a file's tables against each other, and prepare the look-up.

        Args:
            file: the declared tables.
            source: name of the file for errors.

        Raises:
            SettingsError: an impossible value, or two patterns of which neither is more special.
        """
        self.answers: Answers = file.answers
        self.allowance: FreeAllowance = file.allowance
        self.realm, self.description = file.realm, file.description
        _check_list(file, source)
        entries = [_entry(file, table, f"route[{place}]", source) for place, table in enumerate(file.route)]
        entries += [_free_entry(file, text, f"free[{place}]", source) for place, text in enumerate(file.free)]
        _check_overlaps(entries, source)
        self.routes: tuple[Route, ...] = tuple(route for _, _, route in entries)
        """The priced routes in the order of the file, then the free ones."""
        self._tree = PathTree[_Place]()
        places: dict[tuple[str, ...], _Place] = {}
        for _, pattern, route in entries:
            place = places.get(pattern.parts)
            if place is None:
                place = places[pattern.parts] = _Place({})
                self._tree.add(pattern, place)
            place.by_method.update(dict.fromkeys(route.methods, route))
            place.others = place.others if route.methods else route
        self._found: dict[tuple[str, str], Route] = {}

    def find(self, method: str, path: str) -> Route:
        """Return the route of a request: that of the most special pattern that has its method.

        Args:
            method: the request's method.
            path: the path as the client wrote it, without query.

        Raises:
            AmbiguousPath: another program could read the path differently.
            NotForSale: no pattern matches the path.
            MethodNotAllowed: patterns match, but none has the method.
        """
        key = (method, path)
        route = self._found.get(key)
        if route is None:
            route = self._looked_up(method.upper(), path)
            if len(path) <= _CACHED_PATH and len(method) <= 20:
                if len(self._found) >= _CACHED_ROUTES:
                    self._found.clear()
                self._found[key] = route
        return route

    def _looked_up(self, method: str, path: str) -> Route:
        parts = segments(path)
        route = self._matching(method, parts)
        for reading in other_readings(path, parts):
            if self._matching(method, reading) is not route:
                raise AmbiguousPath(reason="a dot, a space or a character that some programs read as another")
        if route is not None:
            return route
        places = self._tree.matches(parts)
        if not places:
            raise NotForSale(path=path)
        allowed = sorted(_with_head(tuple(name for place in places for name in place.by_method)))
        raise MethodNotAllowed(method=method, allowed=allowed)

    def _matching(self, method: str, parts: tuple[str, ...]) -> Route | None:
        for place in self._tree.matches(parts):
            route = place.route(method)
            if route is not None:
                return route
        return None


def parse_prices(text: str, source: str) -> PriceList:
    """Read the TOML text of a price list.

    Raises:
        SettingsError: with the source and the key.
    """
    return PriceList(parse_settings(text, PriceFile, source), source)


def one_price(upstream: str, price_sat: Sat, source: str) -> PriceList:
    """Make the list of a first try: one price for every request to one upstream.

    Raises:
        SettingsError: the URL is wrong, or the price is zero.
    """
    return PriceList(PriceFile(upstream=upstream, route=(RouteTable(path="/**", price_sat=price_sat),)), source)


def _check_list(file: PriceFile, source: str) -> None:
    if not file.route:
        raise SettingsError(source, "route", "required: a price list has at least one [[route]]")
    if file.allowance.requests and file.allowance.seconds:
        raise SettingsError(source, "allowance.seconds", "want either seconds or requests, not both")
    if file.allowance.seconds > file.allowance.hours * 3600:
        reason = f"{file.allowance.seconds} seconds, more than allowance.hours = {file.allowance.hours}"
        raise SettingsError(source, "allowance.seconds", f"{reason}: no request would have a price")


_Entry = tuple[str, Pattern, Route]
"""Key in the file, pattern, route."""


def _entry(file: PriceFile, table: RouteTable, key: str, source: str) -> _Entry:
    for name, reason in _wrong_values(table):
        raise SettingsError(source, f"{key}.{name}", reason)
    return key, _pattern(table.path, f"{key}.path", source), _route(file, table, key, source)


def _wrong_values(table: RouteTable) -> list[tuple[str, str]]:
    """List the values of a route that contradict each other, as (key, reason)."""
    wrong_method = next((method for method in table.methods if not _METHOD.fullmatch(method)), "")
    checks = (
        (table.price_sat and table.ceiling_sat, "ceiling_sat", f"price_sat is {table.price_sat}: want one of them"),
        (
            not table.price_sat and not table.ceiling_sat,
            "price_sat",
            'want a price of at least 1 sat, or ceiling_sat; paths without a price are in "free"',
        ),
        (
            table.unit in METERED and table.ceiling_sat,
            "ceiling_sat",
            f'the gateway counts the unit "{table.unit}" itself: want price_sat',
        ),
        (
            table.unit == "token" and table.price_sat,
            "price_sat",
            "the gateway counts no tokens: want ceiling_sat, and an upstream that says the price",
        ),
        ("" in table.methods or wrong_method, "methods", f'"{wrong_method}": want capital letters, such as "GET"'),
        (len(set(table.methods)) < len(table.methods), "methods", "a method stands there twice"),
        (
            table.mime_type and not _MIME.fullmatch(table.mime_type),
            "mime_type",
            f'"{table.mime_type}": want a type such as "image/png"',
        ),
    )
    return [(name, reason) for wrong, name, reason in checks if wrong]


def _route(file: PriceFile, table: RouteTable, key: str, source: str) -> Route:
    """Build the route; what the table leaves out is that of the list."""
    common, realm = file.timeouts, table.realm or file.realm
    if realm and not _REALM.fullmatch(realm):
        where = f"{key}.realm" if table.realm else "realm"
        raise SettingsError(source, where, f'"{realm}": want letters, digits, spaces and .:_/- (at most 100)')
    description = table.description or file.description
    if _NOT_ONE_LINE.search(description):
        where = f"{key}.description" if table.description else "description"
        raise SettingsError(source, where, "want one line without control characters: it is part of a header")
    return Route(
        path=table.path,
        methods=table.methods,
        unit=table.unit,
        amount_sat=Sat(table.price_sat or table.ceiling_sat),
        is_ceiling=table.ceiling_sat > 0,
        realm=realm,
        description=description,
        mime_type=table.mime_type,
        upstream=_upstream(file, table, key, source),
        timeouts=Timeouts(
            connect_seconds=table.connect_seconds or common.connect_seconds,
            first_byte_seconds=table.first_byte_seconds or common.first_byte_seconds,
            idle_seconds=table.idle_seconds or common.idle_seconds,
        ),
        pause_seconds=table.pause_seconds or file.metering.pause_seconds,
        gives_back=_statuses(table.gives_back, f"{key}.gives_back", source)
        or _statuses(file.gives_back, "gives_back", source),
    )


def _free_entry(file: PriceFile, text: str, key: str, source: str) -> _Entry:
    pattern = _pattern(text, key, source)
    free = _route(file, RouteTable(path=text), key, source)
    return key, pattern, free


def _pattern(text: str, key: str, source: str) -> Pattern:
    try:
        return Pattern(text)
    except ValueError as error:
        raise SettingsError(source, key, f'"{text}": {error}') from None


def _upstream(file: PriceFile, table: RouteTable, key: str, source: str) -> str:
    url, where = (table.upstream, f"{key}.upstream") if table.upstream else (file.upstream, "upstream")
    if not url:
        raise SettingsError(source, f"{key}.upstream", "required, as the list has no upstream for all routes")
    trouble = "want a URL without user and password" if "@" in url else url_trouble(url, ("http", "https"), path=True)
    if trouble:
        raise SettingsError(source, where, trouble if "@" in url else f'"{url}": {trouble}')
    return url.rstrip("/")


def _statuses(names: tuple[str, ...], key: str, source: str) -> frozenset[int]:
    found = set[int]()
    for name in names:
        if not _STATUS.fullmatch(name):
            raise SettingsError(source, key, f'"{name}": want a status such as "503", or a class such as "5xx"')
        found |= set(range(int(name[0]) * 100, int(name[0]) * 100 + 100)) if name.endswith("xx") else {int(name)}
    return frozenset(found)


def _check_overlaps(entries: list[_Entry], source: str) -> None:
    """Refuse two patterns that match a same request if neither is more special than the other."""
    for place, (key, pattern, route) in enumerate(entries):
        where = key if key.startswith("free") else f"{key}.path"
        for earlier, other, before in entries[:place]:
            if pattern.parts == other.parts:
                same = set(route.methods) & set(before.methods) or route.methods == before.methods
                if same:
                    raise SettingsError(source, where, f'"{pattern.text}": {earlier} has this path and method, too')
            elif _methods_meet(route, before) and pattern.crosses(other):
                reason = f'overlaps "{other.text}" of {earlier}, and neither is more special than the other'
                raise SettingsError(source, where, f'"{pattern.text}": {reason}')


def _methods_meet(one: Route, other: Route) -> bool:
    if not one.methods or not other.methods:
        return True
    return bool(_with_head(one.methods) & _with_head(other.methods))


def _with_head(methods: tuple[str, ...]) -> set[str]:
    return {*methods, "HEAD"} if "GET" in methods else set(methods)
