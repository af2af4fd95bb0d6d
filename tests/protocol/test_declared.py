"""Declared settings: a file is read completely or refused with the key, and the same table documents it."""

from __future__ import annotations

from typing import Annotated, Literal

import pytest
from msgspec import Struct, field

from paychan.protocol.settings import Setting, SettingsError, parse_settings, setting, settings_table
from tests.lib.looped import looped


class Fees(Struct, frozen=True, forbid_unknown_fields=True):
    """A section."""

    rate: Annotated[int, setting("fee rate", "sat/vB", ge=1, le=1000)] = 10
    enabled: Annotated[bool, setting("pay fees?")] = True


class Table(Struct, frozen=True, forbid_unknown_fields=True):
    """A whole file."""

    network: Annotated[Literal["live", "test"], setting("which chain")]
    fees: Fees = field(default_factory=Fees)
    memo: str = "none"
    hosts: Annotated[tuple[str, ...], setting("allowed hosts")] = ("localhost", "::1")


def test_a_file_is_read_into_its_table() -> None:
    """Keys in the file get their values, other keys their defaults, also in sections."""
    assert parse_settings('network = "test"\n[fees]\nrate = 3\n', Table, "x.toml") == Table("test", Fees(rate=3))
    assert parse_settings('network = "live"', Table, "x.toml") == Table("live", Fees(10, enabled=True), "none")


@looped(
    ("text", "key", "reason"),
    [
        ("", "network", "required, but not given"),
        ('network = "test"\nnetwrok = 1', "netwrok", "unknown key"),
        ('network = "test"\n[fees]\nrat = 1', "fees.rat", "unknown key"),
        ('network = "test"\n[fees]\nrate = 0', "fees.rate", "0: want a whole number from 1 to 1000 (sat/vB)"),
        ('network = "test"\n[fees]\nrate = 1001', "fees.rate", "1001: want a whole number from 1 to 1000 (sat/vB)"),
        ('network = "test"\n[fees]\nrate = 1.0', "fees.rate", "1.0: want a whole number"),
        ('network = "test"\n[fees]\nrate = true', "fees.rate", "true: want a whole number"),
        ('network = "test"\n[fees]\nenabled = 1', "fees.enabled", "1: want true or false"),
        ('network = "mars"', "network", '"mars": want "live" or "test"'),
        ('network = "test"\nfees = 1', "fees", "1: want a table"),
        ('network = "test"\nmemo = 1979-05-27', "memo", "1979-05-27: want text in quotes"),
        ("network = ", "", "not TOML: Invalid value"),
        ('network = "test"\nnetwork = "test"', "", "not TOML: Cannot overwrite a value"),
    ],
)
def test_an_error_names_source_and_key(text: str, key: str, reason: str) -> None:
    """The error of each mistake names the file, the dotted key, and the expected value."""
    with pytest.raises(SettingsError) as refusal:
        parse_settings(text, Table, "config/x.toml")

    assert (refusal.value.source, refusal.value.key) == ("config/x.toml", key)
    assert str(refusal.value).startswith(f"config/x.toml: {key}: {reason}" if key else f"config/x.toml: {reason}")


def test_the_table_documents_itself() -> None:
    """Each key has its row, in order, with type, default, unit and description."""
    assert settings_table(Table) == [
        Setting("network", "'live' | 'test'", "required", "", "which chain"),
        Setting("fees.rate", "int", "10", "sat/vB", "fee rate"),
        Setting("fees.enabled", "bool", "true", "", "pay fees?"),
        Setting("memo", "str", '"none"', "", ""),
        Setting("hosts", "list of str", '["localhost", "::1"]', "", "allowed hosts"),
    ]
