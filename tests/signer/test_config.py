"""The signer's settings: the shipped files, and every combination that is refused."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from paychan.protocol.settings import SettingsError
from signer.cli.rotate import with_destination
from signer.config import SignerConfig, load_signer_config
from tests.lib.looped import looped

SHIPPED = Path(__file__).parents[2] / "config"
KEY = '[key]\nmode = "hardened"\n'
TEST_ADDRESS = "mm9mm96b8bZRBacaAvY5MEeDd6HW46qFcY"
LIVE_ADDRESS = "1M8iwBs5XD7ZJQJCDC7BdLEpSivRQZJ2Hg"


PKCS11 = '[key]\nmode = "pkcs11"\n[settlement]\ndestination_address = "mm9mm96b8bZRBacaAvY5MEeDd6HW46qFcY"'


def load(tmp_path: Path, text: str) -> SignerConfig:
    file = tmp_path / "signer.toml"
    file.write_text(text)
    return load_signer_config(file)


@looped(
    ("name", "network", "debug", "mode", "create"),
    [
        ("live", "live", False, "hardened", False),
        ("test", "test", False, "hardened", True),
        ("regtest", "regtest", False, "hardened", True),
        ("debug", "test", True, "debug", False),
    ],
)
def test_shipped_files_load(name: str, network: str, debug: bool, mode: str, create: bool) -> None:
    """Each shipped file is accepted; only debug has the debug key, and a live seed is created only by a command."""
    config = load_signer_config(SHIPPED / name / "signer.toml")

    assert (config.network, config.debug, config.key.mode) == (network, debug, mode)
    assert config.key.create_if_missing is create
    home = Path("/var/lib/paychan") if name in ("live", "test") else Path.cwd() / ".paychan"
    assert config.state_dir == home / name
    assert config.socket_path == config.state_dir / "signer.sock"
    assert config.seed_path == config.state_dir / "signer.seed"
    assert config.allowed_uids == {os.geteuid()}


@looped("name", ["live", "test", "regtest", "debug"])
def test_shipped_files_hold_no_secret(name: str) -> None:
    """No shipped file contains a value that could be a key or a seed."""
    assert not re.search(r"[0-9a-fA-F]{64}", (SHIPPED / name / "signer.toml").read_text())


@pytest.mark.parametrize(
    ("text", "key", "reason"),
    [
        (f'network = "live"\ndebug = true\n{KEY}', "debug", 'on the "test" network only, not on "live"'),
        (f'network = "regtest"\ndebug = true\n{KEY}', "debug", 'not on "regtest"'),
        ('network = "live"\n[key]\nmode = "debug"', "key.mode", "publicly known"),
        ('network = "test"\n[key]\nmode = "debug"', "key.mode", "debug = true"),
        ('network = "regtest"\n[key]\nmode = "debug"', "key.mode", "publicly known"),
        ('network = "test"\ndebug = true\n[key]\nmode = "debug"', "settlement.destination_address", "required"),
        (
            f'network = "live"\n{KEY}[settlement]\ndestination_address = "{TEST_ADDRESS}"',
            "settlement.destination_address",
            "address of the test or regtest network; want a P2PKH, P2SH, P2WPKH, P2WSH or P2TR address of the live network",
        ),
        (
            f'network = "test"\n{KEY}[settlement]\ndestination_address = "{LIVE_ADDRESS}"',
            "settlement.destination_address",
            "address of the live network; want a P2PKH, P2SH, P2WPKH, P2WSH or P2TR address of the test network",
        ),
        (
            f'network = "regtest"\n{KEY}[settlement]\nprevious_addresses = ["tb1qw508d6qejxtdg4y5r3zarvary0c5xw7kxpjzsx"]',
            "settlement.previous_addresses",
            "address of the test network; want",
        ),
        (
            f'network = "live"\n{KEY}[settlement]\ndestination_address = "bc1pfeessrawgf"',
            "settlement.destination_address",
            "whose outputs need no signature",
        ),
        (
            f'network = "test"\n{KEY}[settlement]\ndestination_address = "{TEST_ADDRESS[:-1]}Z"',
            "settlement.destination_address",
            "checksum",
        ),
        (f'network = "test"\n{KEY}[socket]\nallowed_uids = [4242]', "socket.allowed_uids", "socket.group"),
        (f'network = "test"\n{KEY}[socket]\nallowed_uids = [-1]', "socket.allowed_uids[0]", "whole number from 0"),
        (f'network = "test"\n{KEY}[socket]\npath = "/{"x" * 107}"', "socket.path", "108 bytes"),
        (f'network = "test"\n{KEY}[socket]\nrequest_seconds = 0', "socket.request_seconds", "above 0"),
        (f'network = "signet"\n{KEY}', "network", "signet"),
        ('network = "test"\n[key]\nmode = "plain"', "key.mode", "plain"),
        (f'network = "test"\n{KEY}seed = "00"', "key.seed", "unknown key"),
        (KEY, "network", "required"),
        ('network = "test"', "key", "required"),
        (f'network = "test"\n{KEY}[settlement]\nprevious_addresses = ["x"]', "settlement.previous_addresses", ""),
        ('network = "test"\n[key]\nmode = "pkcs11"', "settlement.destination_address", 'key.mode = "pkcs11"'),
        (f'network = "test"\n{PKCS11}', "pkcs11.module", "as is pkcs11.token"),
        (f'network = "test"\n{KEY}[policy]\ntrial = ["policy-template"]', "policy.trial", "only ['policy-dest"),
        (f'network = "test"\n{KEY}[policy]\nheartbeat_hours = 1', "policy.heartbeat_hours", "both or none"),
        (f'network = "test"\n{KEY}[isolation]\nrequire = ["magic"]', "isolation.require[0]", "magic"),
        ("network = ", "", "not TOML"),
    ],
)
def test_impossible_settings_are_refused(tmp_path: Path, text: str, key: str, reason: str) -> None:
    """Impossible combinations and wrong values are errors with file, key and reason."""
    with pytest.raises(SettingsError) as refused:
        load(tmp_path, text)

    assert refused.value.source == str(tmp_path / "signer.toml")
    assert refused.value.key == key
    assert reason in refused.value.reason


def test_missing_file_is_refused(tmp_path: Path) -> None:
    """A file that can't be read is an error with its name."""
    with pytest.raises(SettingsError, match=r"none\.toml: can't read the file"):
        load_signer_config(tmp_path / "none.toml")


def test_other_users_are_allowed_through_a_group(tmp_path: Path) -> None:
    """A list of users together with a group is accepted; it always includes the signer's own user."""
    config = load(tmp_path, f'network = "test"\n{KEY}[socket]\ngroup = "paychan"\nallowed_uids = [4242]')

    assert config.allowed_uids == {4242, os.geteuid()}


def test_state_directory_is_the_default_place(tmp_path: Path) -> None:
    """Socket and seed are in `state_dir`, unless they are configured."""
    config = load(tmp_path, f'network = "test"\nstate_dir = "/srv/p"\n{KEY}seed_file = "/etc/p.seed"')

    assert config.socket_path == Path("/srv/p/signer.sock")
    assert config.seed_path == Path("/etc/p.seed")


def test_a_byte_order_mark_is_no_part_of_the_settings(tmp_path: Path) -> None:
    """An editor may write U+FEFF at the beginning of signer.toml; a change of the destination reads it, too."""
    text = f'\ufeffnetwork = "test"\n{KEY}'

    assert load(tmp_path, text).network == "test"
    assert load(tmp_path, with_destination(text, TEST_ADDRESS)).settlement.destination_address == TEST_ADDRESS
