"""The tables of a price list's TOML file, declared once: the page's tables repeat them."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Struct, field

from paychan.protocol.settings import setting

Unit = Literal["request", "byte", "kilobyte", "second", "event", "token"]

KILOBYTE_BYTES = 1000
"""Bytes of the unit `kilobyte`. One that is begun counts whole."""


class Timeouts(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    connect_seconds: Annotated[float, setting("longest wait for a connection to the upstream", "seconds", gt=0)] = 5.0
    first_byte_seconds: Annotated[
        float, setting("longest wait for the upstream's answer to begin", "seconds", gt=0)
    ] = 60.0
    idle_seconds: Annotated[
        float, setting("longest pause inside the upstream's answer, or of a client that reads it", "seconds", gt=0)
    ] = 60.0


class Answers(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    size_mb: Annotated[
        int, setting("memory for answers that are sent again after a lost answer; 0: none", "MB", ge=0, le=1_000_000)
    ] = 64
    largest_kb: Annotated[int, setting("a larger answer is not stored", "kB", ge=1)] = 1024
    minutes: Annotated[float, setting("time for which an answer is stored", "minutes", gt=0)] = 10.0


class Metering(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pause_seconds: Annotated[
        float, setting("an answer whose credit has ended waits this time for a payment, then ends", "seconds", gt=0)
    ] = 60.0


class FreeAllowance(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    requests: Annotated[int, setting("free requests of each client address; 0: none", "requests", ge=0)] = 0
    seconds: Annotated[
        int, setting("time from an address's first request in which its requests are free; 0: none", "seconds", ge=0)
    ] = 0
    hours: Annotated[float, setting("after this time an address has a new allowance", "hours", gt=0)] = 24.0
    addresses: Annotated[
        int, setting("most addresses with an allowance at a time; further ones pay at once", ge=1, le=10_000_000)
    ] = 100_000


class RouteTable(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One `[[route]]`."""

    path: Annotated[str, setting('path: exact, with "*" for one segment, or "**" at the end for the rest')]
    methods: Annotated[
        tuple[str, ...], setting('methods, such as ["GET"], which includes HEAD; []: all that no other route names')
    ] = ()
    unit: Annotated[Unit, setting("unit of the price")] = "request"
    price_sat: Annotated[int, setting("price of one unit", "sat", ge=0)] = 0
    ceiling_sat: Annotated[
        int, setting("instead of price_sat: highest price; the upstream says the price in its answer", "sat", ge=0)
    ] = 0
    description: Annotated[str, setting('one sentence for payers; "": that of the list', max_length=500)] = ""
    mime_type: Annotated[str, setting("type of the answers, for catalogues", max_length=100)] = ""
    upstream: Annotated[str, setting('URL of the upstream; "": that of the list', "URL")] = ""
    realm: Annotated[str, setting('name of the service; "": that of the list')] = ""
    gives_back: Annotated[
        tuple[str, ...], setting("upstream statuses that give the price back; []: those of the list")
    ] = ()
    connect_seconds: Annotated[float, setting("0: that of [timeouts]", "seconds", ge=0)] = 0.0
    first_byte_seconds: Annotated[float, setting("0: that of [timeouts]", "seconds", ge=0)] = 0.0
    idle_seconds: Annotated[float, setting("0: that of [timeouts]", "seconds", ge=0)] = 0.0
    pause_seconds: Annotated[float, setting("0: that of [metering]", "seconds", ge=0)] = 0.0


class PriceFile(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole file."""

    upstream: Annotated[
        str, setting("URL of the service whose answers are sold, such as http://127.0.0.1:5000", "URL")
    ] = ""
    realm: Annotated[str, setting('name of the service; "": the host of each request')] = ""
    description: Annotated[str, setting("one sentence for payers", max_length=500)] = ""
    free: Annotated[
        tuple[str, ...],
        setting('paths without a price, such as ["/health", "/static/**"]; a route\'s path wins if it is more special'),
    ] = ()
    gives_back: Annotated[
        tuple[str, ...],
        setting('upstream statuses that give the price back, such as ["5xx", "429"]; no answer always does'),
    ] = ("5xx",)
    timeouts: Timeouts = field(default_factory=Timeouts)
    answers: Answers = field(default_factory=Answers)
    metering: Metering = field(default_factory=Metering)
    allowance: FreeAllowance = field(default_factory=FreeAllowance)
    route: Annotated[tuple[RouteTable, ...], setting("the routes, each a `[[route]]`")] = ()
