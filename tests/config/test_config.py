"""The declared settings of server and signer, the shipped files, and the pages' tables of them."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from paychan.config import ServerConfig, load_server_config
from paychan.protocol.settings import SettingsError, settings_table, settings_values
from signer.config import SignerConfig, load_signer_config
from tests.lib.readme import SECTIONS, SHIPPED, in_pages, with_comments

CONFIG = Path(__file__).parents[2] / "config"
NETWORKS = ("live", "test", "regtest", "debug")

SERVER = 'network = "test"\ndebug = true\n[chain]\nbackend = "debug"\n'

REGTEST = 'network = "regtest"\n[chain]\nbackend = "electrum"\nurl = "tcp://127.0.0.1:1"\n'


def written(directory: Path, text: str) -> Path:
    file = directory / "server.toml"
    file.write_text(text)
    return file


def keys_of(table: dict, prefix: str = "") -> set[str]:
    found = set()
    for name, value in table.items():
        found |= keys_of(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name}
    return found


@pytest.mark.parametrize("network", NETWORKS)
def test_fault_44_shipped_files_load_and_name_what_differs_from_the_defaults(network: str) -> None:
    """Each shipped file is valid, is for the network of its folder, and repeats no default."""
    server, signer = CONFIG / network / "server.toml", CONFIG / network / "signer.toml"

    assert load_server_config(server).network_name == network
    assert load_signer_config(signer).network_name == network
    for file, table, load in ((server, ServerConfig, load_server_config), (signer, SignerConfig, load_signer_config)):
        values, rows = settings_values(load(file)), {row.key: row for row in settings_table(table)}
        named = keys_of(tomllib.loads(file.read_text()))
        differing = {key for key, row in rows.items() if row.shown(values[key]) != row.default}
        assert named == differing
        assert "settings FILE` shows all keys" in file.read_text()


@pytest.mark.parametrize("network", NETWORKS)
def test_shipped_files_hold_no_secret(network: str) -> None:
    """No shipped file holds anything that could be a key: 64 hex digits, WIF or an extended key."""
    for file in (CONFIG / network).iterdir():
        assert not re.search(r"[0-9a-fA-F]{64}|\b[5KLc9][1-9A-HJ-NP-Za-km-z]{50,51}\b|[xt]prv", file.read_text())


@pytest.mark.parametrize("network", NETWORKS)
def test_state_stays_apart_by_network(network: str) -> None:
    """By default, server and signer keep data under /var/lib/paychan/<network>; of trials under ./.paychan/<network>."""
    home = Path("/var/lib/paychan") if network in ("live", "test") else Path(".paychan").resolve()
    expected = home / network

    assert load_server_config(CONFIG / network / "server.toml").state_dir == expected
    assert load_signer_config(CONFIG / network / "signer.toml").state_dir == expected


@pytest.mark.parametrize(
    ("text", "key", "reason"),
    [
        (SERVER + "[http]\nprot = 1\n", "http.prot", "unknown key"),
        ("colour = 1\n" + SERVER, "colour", "unknown key"),
        (SERVER + '[http]\nport = "8000"\n', "http.port", "Expected `int`, got `str`"),
        (SERVER + '[http]\npublic_url = "pay.example"\n', "http.public_url", "https?://"),
        (SERVER + "[http]\nport = 65536\n", "http.port", "Expected `int` <= 65535"),
        (SERVER + "[open]\nadd_settlement_fee = 1\n", "open.add_settlement_fee", "Expected `bool`, got `int`"),
        (SERVER + "[channel]\ndust_limit_sat = 545\n", "channel.dust_limit_sat", "Expected `int` >= 546"),
        ("debug = true\n", "network", "required, but not given"),
        (SERVER.replace('"test"', '"live"'), "debug", 'exists on the "test" network only'),
        (SERVER.replace("debug = true", "debug = false"), "chain.backend", "does not go with debug = false"),
        (SERVER.replace('backend = "debug"', 'backend = "bitcoind"'), "chain.backend", "does not go with debug = true"),
        (
            SERVER + "[open]\nmin_duration_hours = 5\n[channel]\nsettlement_period_hours = 6\n",
            "open.min_duration_hours",
            "5 hours, less than channel.settlement_period_hours = 6",
        ),
        (
            SERVER + "[open]\nmin_confirmations = 1\nsmaller = [{ up_to_sat = 5, confirmations = 2 }]\n",
            "open.smaller",
            "no row fewer confirmations than the row before",
        ),
        (
            SERVER + "[open]\nsmaller = [{ up_to_sat = 5, confirmations = 0 }, { up_to_sat = 4, confirmations = 1 }]\n",
            "open.smaller",
            "growing up_to_sat",
        ),
        (REGTEST + "[open]\nmin_confirmations = 0\n", "open.unconfirmed_limit_sat", "the largest total value at risk"),
        (REGTEST.replace('url = "tcp://127.0.0.1:1"', ""), "chain.url", 'required with backend = "electrum"'),
        (REGTEST.replace("electrum", "bitcoind"), "chain.credentials_file", "the path of its .cookie"),
        (SERVER + "[settlement]\nfee_sat_per_vb = 300\n", "settlement.fee_sat_per_vb", "more than settlement.max_fee"),
        ("network = \n", "", "not TOML"),
    ],
)
def test_wrong_settings_stop_with_file_key_and_reason(tmp_path: Path, text: str, key: str, reason: str) -> None:
    """An unknown key, a wrong type, a value out of range or a contradiction names file, key and reason."""
    file = written(tmp_path, text)

    with pytest.raises(SettingsError) as caught:
        load_server_config(file)

    assert caught.value.key == key
    assert str(file) in str(caught.value)
    assert reason in str(caught.value)


def test_a_file_that_is_not_there_says_so(tmp_path: Path) -> None:
    """A missing file causes an error with its name, not a traceback."""
    with pytest.raises(SettingsError, match="can't be read"):
        load_server_config(tmp_path / "nothing.toml")


@pytest.mark.parametrize(("value", "port"), [("8080", 8080), ("", 8000), ("x", 8000), ("99999", 8000), ("-1", 8000)])
def test_port_of_the_environment_overrides(monkeypatch, tmp_path: Path, value: str, port: int) -> None:
    """PORT overrides http.port if it is a port number, and is ignored otherwise."""
    monkeypatch.setenv("PORT", value)

    assert load_server_config(written(tmp_path, SERVER)).port == port


def test_the_opening_price_of_v1_includes_the_fee_of_the_originals_settlement(tmp_path: Path) -> None:
    """RBPCP §7.3: 70000 + 40 x 331 = 83240 satoshi with the shipped settings."""
    assert load_server_config(written(tmp_path, SERVER)).v1_price_sat == 83_240


@pytest.mark.parametrize("name", SECTIONS)
def test_readme_tables_are_those_of_the_code(name: str) -> None:
    """One page has each generated table, and it is up to date (`python -m tests.lib.readme` writes them)."""
    assert in_pages(name) == [SECTIONS[name]()]


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_comments_of_shipped_files_are_the_declared_descriptions(file: Path) -> None:
    """Each key has its description and unit as comment (`python -m tests.lib.readme` writes them)."""
    assert file.read_text() == with_comments(file.read_text(), SHIPPED[file])
