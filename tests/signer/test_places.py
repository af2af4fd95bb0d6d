"""Directories that other users can write or own are refused before the first write."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from paychan.protocol.settings import SettingsError
from signer.config import load_signer_config
from signer.sandbox.directories import PlaceError, check_places
from signer.service import start
from tests.lib.signer_process import REGTEST

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="giving files away needs root")


def configured(tmp_path: Path, rest: str = "") -> Path:
    (tmp_path / "state").mkdir(mode=0o700)
    file = tmp_path / "signer.toml"
    file.write_text(f'state_dir = "{tmp_path}/state"\n{REGTEST}{rest}')
    return file


def open_to_all(tmp_path: Path) -> None:
    (tmp_path / "state").chmod(0o777)


def open_to_all_though_sticky(tmp_path: Path) -> None:
    (tmp_path / "state").chmod(0o1777)


def open_to_the_group(tmp_path: Path) -> None:
    (tmp_path / "state").chmod(0o770)


def open_above(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)


def linked_ledger(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "state" / "signer.ledger").symlink_to(tmp_path / "elsewhere")


def dangling_ledger(tmp_path: Path) -> None:
    (tmp_path / "state" / "signer.ledger").symlink_to(tmp_path / "elsewhere")


def open_ledger(tmp_path: Path) -> None:
    (tmp_path / "state" / "signer.ledger").mkdir()
    (tmp_path / "state" / "signer.ledger").chmod(0o777)


def ledger_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "state" / "signer.ledger").touch()


def linked_audit(tmp_path: Path) -> None:
    (tmp_path / "state" / "signer.audit").symlink_to(tmp_path / "elsewhere")


def linked_socket(tmp_path: Path) -> None:
    (tmp_path / "state" / "signer.sock").symlink_to(tmp_path / "elsewhere")


CASES: dict[Callable[[Path], None], tuple[str, str]] = {
    open_to_all: ("state_dir", "has mode 0777, others can write to it: `chmod go-w "),
    open_to_all_though_sticky: ("state_dir", "has mode 1777"),
    open_to_the_group: ("state_dir", "has mode 0770"),
    open_above: ("state_dir", "can be written by all users, who could replace"),
    linked_ledger: ("state_dir", "signer.ledger is a link"),
    dangling_ledger: ("state_dir", "signer.ledger is a link"),
    open_ledger: ("state_dir", "signer.ledger has mode 0777"),
    ledger_is_a_file: ("state_dir", "signer.ledger is not a directory"),
    linked_audit: ("state_dir", "signer.audit is a link"),
    linked_socket: ("socket.path", "signer.sock is a link"),
}


@pytest.mark.parametrize("harm", CASES, ids=lambda harm: harm.__name__)
def test_fault_80_places_that_others_can_change_are_refused(tmp_path: Path, harm: Callable[[Path], None]) -> None:
    """Each is named with its setting and the remedy, and no file is made there."""
    config = load_signer_config(configured(tmp_path))
    check_places(config)
    harm(tmp_path)
    before = sorted(tmp_path.rglob("*"))

    with pytest.raises(PlaceError) as refused:
        check_places(config)

    assert (refused.value.key, CASES[harm][1] in str(refused.value)) == (CASES[harm][0], True), refused.value
    assert sorted(tmp_path.rglob("*")) == before


@needs_root
def test_fault_80_a_directory_of_another_user_is_refused(tmp_path: Path) -> None:
    """Its owner could change the content at any time."""
    config = load_signer_config(configured(tmp_path))
    os.chown(tmp_path / "state", 65534, -1)

    with pytest.raises(PlaceError, match="belongs to uid 65534, this is uid 0"):
        check_places(config)


def test_fault_80_the_socket_and_the_seed_have_the_same_rules(tmp_path: Path) -> None:
    """The same holds if they are in other directories."""
    for name, key, line in (
        ("run", "socket.path", '[socket]\npath = "{}/run/x.sock"\n'),
        ("seeds", "key.seed_file", 'seed_file = "{}/seeds/x"\n'),
    ):
        directory = tmp_path / key
        (directory / name).mkdir(parents=True)
        (directory / name).chmod(0o777)
        with pytest.raises(PlaceError, match="has mode 0777") as refused:
            check_places(load_signer_config(configured(directory, line.format(directory))))
        assert refused.value.key == key


def test_fault_80_the_start_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The refusal names file and setting, before a seed or a ledger is created."""
    file = configured(tmp_path)
    open_to_all(tmp_path)
    monkeypatch.setattr("signer.service.isolate", lambda *_, **__: ())

    with pytest.raises(SettingsError, match="has mode 0777") as refused:
        start(file)

    assert (refused.value.source, refused.value.key) == (str(file), "state_dir")
    assert list((tmp_path / "state").iterdir()) == []


@pytest.mark.parametrize("mode", [0o666, 0o646])
def test_fault_80_a_configuration_that_every_user_can_write_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int
) -> None:
    """Otherwise any user of the machine could set the destination of settlements for the next start."""
    file = configured(tmp_path)
    file.chmod(mode)
    monkeypatch.setattr("signer.service.isolate", lambda *_, **__: ())

    with pytest.raises(SettingsError, match="every user can change it"):
        start(file)

    assert list((tmp_path / "state").iterdir()) == []
