"""The places of data if no directory is named: the same from every current directory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from paychan.config import load_server_config
from paychan.protocol.settings import SettingsError
from paychan.shared import places
from signer.config import load_signer_config
from tests.lib.settings import with_settings
from tests.signer.place import WORD, Place, private, recovered

CONFIG = Path(__file__).parents[2] / "config"
SCRIPTS = Path(sys.executable).parent


def wallet_list(directory: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `paychan channel list` with this environment alone."""
    command = [SCRIPTS / "paychan", "channel", "list"]
    fixed = {"PATH": os.environ["PATH"], "COLUMNS": "200"}
    return subprocess.run(
        command, cwd=directory, env={**fixed, **environment}, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("network", ["live", "test"])
def test_fault_56_the_state_does_not_depend_on_the_directory_of_the_start(
    network: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With coins, server and signer use one directory below /var/lib/paychan, wherever they are started."""
    for current in (tmp_path, CONFIG.parent, Path("/")):
        monkeypatch.chdir(current)
        assert load_server_config(CONFIG / network / "server.toml").state_dir == Path("/var/lib/paychan") / network
        assert load_signer_config(CONFIG / network / "signer.toml").state_dir == Path("/var/lib/paychan") / network


@pytest.mark.parametrize(
    ("name", "key", "path"),
    [
        ("server.toml", "state_dir", "data"),
        ("signer.toml", "state_dir", "./data"),
        ("signer.toml", "key.seed_file", "signer.seed"),
        ("server.toml", "store.path", "store"),
        ("server.toml", "store.backup_dir", "backups"),
    ],
)
@pytest.mark.parametrize("network", ["live", "test", "regtest"])
def test_fault_56_a_relative_path_is_refused_where_coins_are(
    network: str, name: str, key: str, path: str, tmp_path: Path
) -> None:
    """Such a path has data in one current directory only; trials may use one."""
    file = tmp_path / name
    file.write_text(with_settings((CONFIG / network / name).read_text(), {key: path}))
    load = load_server_config if name == "server.toml" else load_signer_config

    if network == "regtest":
        load(file)
        return
    with pytest.raises(SettingsError, match="depends on the directory of the start") as refused:
        load(file)
    assert refused.value.key == key


def test_fault_56_a_seed_in_the_old_place_is_used_with_a_note(tmp_path: Path) -> None:
    """The state of an earlier version is found where it is, and the start says where it belongs."""
    state = tmp_path / ".paychan" / "live"
    state.mkdir(parents=True, mode=0o700)
    passphrase = private(tmp_path / "passphrase", WORD)
    file = tmp_path / "signer.toml"
    file.write_text(f'network = "live"\nstate_dir = "{state}"\n[key]\nmode = "hardened"\n')
    recovered(Place(file, state / "signer.seed", passphrase))
    file.write_text('network = "live"\n[key]\nmode = "hardened"\n')

    with subprocess.Popen(
        [SCRIPTS / "paychan-signer", file, "--passphrase-file", passphrase],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    ) as signer:
        assert signer.stderr is not None
        lines = []
        for line in signer.stderr:
            lines.append(line)
            if "signer started" in line:
                break
        signer.terminate()

    assert any(f"data is in {state}" in line and "/var/lib/paychan/live" in line for line in lines), lines
    assert f"state={state}" in lines[-1]


def test_fault_56_data_in_two_places_stops_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither of two states is taken silently: the error names both."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(places, "STATE_HOME", tmp_path / "var")
    for state in (tmp_path / ".paychan" / "live", tmp_path / "var" / "live"):
        state.mkdir(parents=True)
        (state / "signer.seed").touch()
    for load, name in ((load_server_config, "server.toml"), (load_signer_config, "signer.toml")):
        with pytest.raises(SettingsError, match=f"both {tmp_path}/var/live and {tmp_path}/.paychan/live") as refused:
            load(CONFIG / "live" / name)
        assert refused.value.key == "state_dir"


def test_fault_56_a_wallet_is_where_the_platform_keeps_data(tmp_path: Path) -> None:
    """$XDG_DATA_HOME, or else ~/.local/share; a relative $XDG_DATA_HOME is ignored, as its specification says."""
    home = tmp_path / "home"
    for name, environment, expected in (
        ("one", {"HOME": str(home)}, home / ".local/share/paychan/wallet"),
        ("two", {"HOME": str(home), "XDG_DATA_HOME": str(tmp_path / "data")}, tmp_path / "data/paychan/wallet"),
        ("three", {"HOME": "/nonexistent", "XDG_DATA_HOME": str(tmp_path / "d")}, tmp_path / "d/paychan/wallet"),
        ("four", {"HOME": str(tmp_path / "h"), "XDG_DATA_HOME": "data"}, tmp_path / "h/.local/share/paychan/wallet"),
    ):
        current = tmp_path / name
        current.mkdir()
        done = wallet_list(current, **environment)

        assert done.returncode == 0, done.stderr
        assert expected.is_dir()
        assert not done.stderr
        assert not list(current.iterdir())


def test_fault_56_a_wallet_in_the_old_place_is_used_with_a_note(tmp_path: Path) -> None:
    """~/.paychan/wallet stays the wallet; once the new place has channels, the old one is named."""
    old, new = tmp_path / ".paychan/wallet", tmp_path / ".local/share/paychan/wallet"
    old.mkdir(parents=True, mode=0o700)
    (old / "wallet.seed.lock").touch(0o600)

    used = wallet_list(tmp_path, HOME=str(tmp_path))
    new.mkdir(parents=True, mode=0o700)
    (new / "wallet.seed.lock").touch(0o600)
    both = wallet_list(tmp_path, HOME=str(tmp_path))

    assert (used.returncode, both.returncode) == (0, 0)
    assert f"the wallet is in {old}" in used.stderr
    assert f"{old} has channels too" in both.stderr


def test_fault_56_a_wallet_without_a_place_is_a_sentence(tmp_path: Path) -> None:
    """A directory that can't be made is named, with the remedy."""
    (tmp_path / "file").touch()
    done = wallet_list(tmp_path, HOME=str(tmp_path / "file"))

    assert done.returncode == 1
    assert "PAYCHAN_WALLET names another" in done.stderr
    assert "Traceback" not in done.stderr
