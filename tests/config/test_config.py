"""The declared settings of server and signer, the shipped files, and the pages' tables of them."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest

from paychan.config import ServerConfig, check_environment, load_server_config
from paychan.config_checks import doubts
from paychan.protocol.settings import SettingsError, parse_settings, settings_table, settings_values
from signer.config import SignerConfig, load_signer_config
from tests.lib.looped import looped
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


@looped("network", NETWORKS)
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


@looped("network", NETWORKS)
def test_shipped_files_hold_no_secret(network: str) -> None:
    """No shipped file holds anything that could be a key: 64 hex digits, WIF or an extended key."""
    for file in (CONFIG / network).iterdir():
        assert not re.search(r"[0-9a-fA-F]{64}|\b[5KLc9][1-9A-HJ-NP-Za-km-z]{50,51}\b|[xt]prv", file.read_text())


@looped("network", NETWORKS)
def test_state_stays_apart_by_network(network: str) -> None:
    """By default, server and signer keep data under /var/lib/paychan/<network>; of trials under ./.paychan/<network>."""
    home = Path("/var/lib/paychan") if network in ("live", "test") else Path(".paychan").resolve()
    expected = home / network

    assert load_server_config(CONFIG / network / "server.toml").state_dir == expected
    assert load_signer_config(CONFIG / network / "signer.toml").state_dir == expected


@looped(
    ("text", "key", "reason"),
    [
        (SERVER + "[http]\nprot = 1\n", "http.prot", "unknown key"),
        ("colour = 1\n" + SERVER, "colour", "unknown key"),
        (SERVER + '[http]\npublic_url = "pay.example"\n', "http.public_url", "https://host[:port]"),
        (SERVER + '[http]\nport = "8000"\n', "http.port", '"8000": want a whole number from 0 to 65535'),
        (SERVER + "[http]\nport = 65536\n", "http.port", "65536: want a whole number from 0 to 65535"),
        (SERVER + "[open]\nadd_settlement_fee = 1\n", "open.add_settlement_fee", "1: want true or false"),
        (
            SERVER + "[channel]\ndust_limit_sat = 545\n",
            "channel.dust_limit_sat",
            "545: want a whole number from 546 to ",
        ),
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
        (
            REGTEST.replace("electrum", "bitcoind").replace("tcp:", "http:"),
            "chain.credentials_file",
            "the path of its .cookie",
        ),
        (SERVER + "[settlement]\nfee_sat_per_vb = 300\n", "settlement.fee_sat_per_vb", "more than settlement.max_fee"),
        (SERVER + "[callback]\ntimeout_seconds = 11\n", "callback.timeout_seconds", "10"),  # payers wait 30 s
        ("network = \n", "", "not TOML"),
        (SERVER + '[gateway]\nupstream = "h:1"\nprice_sat = 1\n', "gateway.upstream", '"h:1": want http://host[:port]'),
        (SERVER + '[gateway]\nupstream = "http://u:p@h"\nprice_sat = 1\n', "gateway.upstream", "without user"),
        (SERVER + '[gateway]\nupstream = "http://h"\n', "gateway.price_sat", "at least 1 sat"),
        (SERVER + "[gateway]\nprice_sat = 1\n", "gateway.price_sat", "want gateway.upstream"),
        (SERVER + '[gateway]\nupstream = "http://h"\nprice_sat = 1\nprices = "p.toml"\n', "gateway.upstream", "one of"),
        (SERVER + '[gateway]\nprices = "/"\n', "gateway.prices", "want a file"),
        (SERVER + '[gateway]\nlisten = "h:1"\n', "gateway.listen", "without port"),
        (SERVER + '[merchant]\nlisten = "h:1"\n', "merchant.listen", "without port"),
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
    """PORT overrides http.port if it is a port number; a command that asks a server ignores any other text."""
    monkeypatch.setenv("PORT", value)

    assert load_server_config(written(tmp_path, SERVER)).port == port


def test_the_opening_price_of_v1_includes_the_fee_of_the_originals_settlement(tmp_path: Path) -> None:
    """RBPCP §7.3: 70000 + 40 x 331 = 83240 satoshi with the shipped settings."""
    assert load_server_config(written(tmp_path, SERVER)).v1_price_sat == 83_240


@looped("name", SECTIONS)
def test_readme_tables_are_those_of_the_code(name: str) -> None:
    """One page has each generated table, and it is up to date (`python -m tests.lib.readme` writes them)."""
    assert in_pages(name) == [SECTIONS[name]()]


@looped("file", SHIPPED, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_comments_of_shipped_files_are_the_declared_descriptions(file: Path) -> None:
    """Each key has its description and unit as comment (`python -m tests.lib.readme` writes them)."""
    assert file.read_text() == with_comments(file.read_text(), SHIPPED[file])


URL = 'network = "regtest"\n[chain]\nbackend = "{}"\ncredentials_file = "/cookie"\nurl = "{}"\n'


@looped(
    ("backend", "url"),
    [
        *(
            ("electrum", url)
            for url in ("http://h:1", "h:50001", "tcp://h", "ssl://:50002", "ssl://h:1/x", "tcp://[::1")
        ),
        *(
            ("bitcoind", url)
            for url in ("tcp://h:1", "h:8332", "http://", "https://h:99999", "http://[::1", "http://h:x")
        ),
    ],
)
def test_fault_55_a_url_that_does_not_go_with_the_backend(tmp_path: Path, backend: str, url: str) -> None:
    """The sentence names the key, the URL, and the form that the backend needs."""
    with pytest.raises(SettingsError) as caught:
        load_server_config(written(tmp_path, URL.format(backend, url)))

    scheme = "tcp://host:port" if backend == "electrum" else "http://host[:port]"
    assert caught.value.key == "chain.url"
    assert f'"{url}": want' in caught.value.reason
    assert scheme in caught.value.reason


@looped(
    ("backend", "url"),
    [
        *(("electrum", url) for url in ("tcp://127.0.0.1:50001", "ssl://electrum.example:50002", "ssl://[::1]:50002")),
        *(("bitcoind", url) for url in ("http://127.0.0.1:8332", "http://node/", "https://[::1]:8332", "http://a_b")),
    ],
)
def test_urls_that_go_with_the_backend(tmp_path: Path, backend: str, url: str) -> None:
    """Names, addresses of both families, and a slash at the end are accepted."""
    assert load_server_config(written(tmp_path, URL.format(backend, url))).chain.url == url


@looped(
    ("lines", "key"),
    [
        ('[http]\nlisten = "0.0.0.0:8000"', "http.listen"),
        ('[http]\nlisten = "http://0.0.0.0"', "http.listen"),
        ('[management]\nlisten = "[::1]"', "management.listen"),
        ('[management]\nlisten = ""', "management.listen"),
        ('[http]\nlisten = ""', "http.listen"),
        ('[http]\nlisten = "300.1.1.1"', "http.listen"),
        ('[chain]\nbackend = "debug"\nwallet = "../x"', "chain.wallet"),
        ('[chain]\nbackend = "debug"\nwallet = ".."', "chain.wallet"),
        ('[chain]\nbackend = "debug"\nurl = "http://user:geheim@node:1"', "chain.url"),
        ('[store]\nbackup_dir = "/dev/null"', "store.backup_dir"),
        ('[store]\npath = "/dev/null"', "store.path"),
        ('[http]\npublic_url = "pay.example"', "http.public_url"),
        ('[http]\npublic_url = "https://pay.example/?shop=1"', "http.public_url"),
        ('[callback]\nurl = "localhost:8080/paid"', "callback.url"),
        ('[callback]\nurl = "ftp://localhost/paid"', "callback.url"),
        ("[stream]\nping_seconds = inf", "stream.ping_seconds"),
        ("[stream]\nping_seconds = nan", "stream.ping_seconds"),
        ("[http]\nidle_seconds = 99999999999999999999", "http.idle_seconds"),
        ("[watcher]\ninterval_seconds = 1e300", "watcher.interval_seconds"),
        ("[settlement]\nmax_fee_percent = 101", "settlement.max_fee_percent"),
        ('[log]\nlevel = "trace"', "log.level"),
        ('[callback]\nunanswered = "maybe"', "callback.unanswered"),
        ("[open]\nsmaller = 3", "open.smaller"),
        ('[open]\nsmaller = [{up_to_sat = "x", confirmations = 1}]', "open.smaller[0].up_to_sat"),
    ],
)
def test_fault_55_a_wrong_value_gets_a_sentence_with_the_valid_ones(tmp_path: Path, lines: str, key: str) -> None:
    """Every enum, number, URL and address: the sentence says what was found and what is valid."""
    with pytest.raises(SettingsError) as caught:
        load_server_config(
            written(tmp_path, (SERVER.partition("[chain]")[0] if "[chain]" in lines else SERVER) + f"{lines}\n")
        )

    assert caught.value.key == key
    assert "geheim" not in str(caught.value)
    assert re.search(r": want .", caught.value.reason)


def declared() -> list[tuple[type, str, object]]:
    """Every setting of both programs with a wrong value: a number in place of a text, else a text."""
    return [
        (table, row.key, 7 if row.kind == "str" or "|" in row.kind else "wrong")
        for table in (ServerConfig, SignerConfig)
        for row in settings_table(table)
    ]


@looped(("table", "key", "value"), declared())
def test_fault_55_every_setting_says_what_it_wants(table: type, key: str, value: object) -> None:
    """No setting of server or signer answers a wrong value in the words of the decoder."""
    tree: dict[str, dict[str, object]] = {
        "": {"network": "test"},
        "chain": {"backend": "debug"},
        "key": {"mode": "debug"},
    }
    del tree["key" if table is ServerConfig else "chain"]
    section, _, name = key.rpartition(".")
    tree.setdefault(section, {})[name] = value
    text = "".join(
        (f"[{title}]\n" if title else "") + "".join(f"{each} = {json.dumps(of)}\n" for each, of in rows.items())
        for title, rows in tree.items()
    )
    with pytest.raises(SettingsError) as caught:
        parse_settings(text, table, "FILE")

    assert caught.value.key == key
    assert caught.value.reason.startswith(f"{json.dumps(value)}: want ")
    assert "Expected" not in caught.value.reason


def test_fault_55_a_network_by_another_name(tmp_path: Path) -> None:
    """The names of other programs for networks are answered by those of this one."""
    with pytest.raises(SettingsError, match='"mainnet": want "live", "test" or "regtest"'):
        load_server_config(written(tmp_path, SERVER.replace('"test"', '"mainnet"')))


def test_fault_55_an_unknown_key_gets_the_known_ones(tmp_path: Path) -> None:
    """The sentence lists the keys of that section."""
    with pytest.raises(SettingsError, match=r"unknown key; \[management\] has listen, port"):
        load_server_config(written(tmp_path, SERVER + "[management]\nprot = 1\n"))


@pytest.mark.parametrize("text", ["abc", "-1", "65536", "80 ", "٣"])
def test_fault_55_a_port_of_the_environment_that_is_none_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server does not listen on another port than the one that PORT was meant to be."""
    monkeypatch.setenv("PORT", text)
    with pytest.raises(SettingsError, match=r"PORT.*want a port number, 0 to 65535"):
        check_environment()


@pytest.mark.parametrize("text", ["", "0", "8000", "65535"])
def test_a_port_of_the_environment(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A port number is taken; an empty variable counts as none."""
    monkeypatch.setenv("PORT", text)
    check_environment()


def test_a_byte_order_mark_is_no_part_of_the_settings(tmp_path: Path) -> None:
    """An editor may write U+FEFF at the beginning of server.toml."""
    assert load_server_config(written(tmp_path, "\ufeff" + SERVER)).debug


@looped(
    ("lines", "keys"),
    [
        ("", []),
        ('[management]\nlisten = "::1"\n', []),
        ('[management]\nlisten = "0.0.0.0"\n', ["management.listen"]),
        ('[management]\nlisten = "operator.example"\n', ["management.listen"]),
        ('[merchant]\nlisten = "0.0.0.0"\n', ["merchant.listen"]),
        ("[watcher]\nalarm_hours = 7\n", ["watcher.alarm_hours"]),
    ],
)
def test_settings_that_are_seldom_meant_are_named(tmp_path: Path, lines: str, keys: list[str]) -> None:
    """The server warns of an operator's interface for other machines, and of alarms while payments go on."""
    assert [key for key, _ in doubts(load_server_config(written(tmp_path, SERVER + lines)))] == keys
