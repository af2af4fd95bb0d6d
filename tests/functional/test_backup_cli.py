"""`paychan backup` on the files of a stopped server: its commands, their output and their exit status."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from msgspec.structs import replace

from paychan.protocol.channel import State
from paychan.protocol.record import decode_record
from paychan.store.backup.archive import read_records
from paychan.store.base import Change
from paychan.store.leveldb.store import LevelDbStore
from tests.lib.channels import Payer
from tests.lib.system import System

PAYCHAN = Path(sys.executable).with_name("paychan")


class Operator:
    """An operator at a shell, with one server configured in a directory."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.config = home / "server.toml"
        self.state = home / "state"
        self.config.write_text(
            f'network = "test"\ndebug = true\nstate_dir = "{self.state}"\n[chain]\nbackend = "debug"\n'
        )

    def runs(self, *arguments: object, status: int = 0) -> str:
        """Run `paychan backup …` and return its output."""
        command = [PAYCHAN, "backup", *map(str, arguments)]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, cwd=self.home, env={"COLUMNS": "200"}
        )
        output = done.stdout + done.stderr
        assert done.returncode == status, output
        assert "Traceback" not in output
        return output

    def fill(self) -> None:
        """Give the server a channel in each state."""

        async def write() -> None:
            store = LevelDbStore.open(self.state / "store", "debug")
            for state in State:
                versions = Payer(state.value).history(state)
                pairs = zip([None, *versions], versions, strict=False)
                assert all(await store.commit([Change(old, new) for old, new in pairs]))
            await store.close()

        asyncio.run(write())

    def backups(self) -> list[Path]:
        return sorted((self.state / "backups").glob("*.backup"))


@pytest.fixture
def operator(tmp_path: Path) -> Operator:
    someone = Operator(tmp_path)
    someone.fill()
    return someone


def test_a_lost_store_is_restored(operator: Operator) -> None:
    """Back up, lose the store, restore: the commands report what they did, and the next backup has the same records."""
    output = operator.runs("create", operator.config)
    (first,) = operator.backups()
    assert f"created {first}" in output
    assert "1 open, 1 closing, 1 published, 1 closed, 1 lost" in output
    assert "30,000 sat" in output

    (operator.state / "store").rename(operator.home / "lost")
    output = operator.runs("restore", operator.config, first)
    assert f"restored {operator.state / 'store'}" in output
    assert re.search(r"accepted after .*Z \(.* ago\) are not in it", output)
    operator.runs("create", operator.config, "--to", operator.home / "elsewhere")
    (second,) = (operator.home / "elsewhere").iterdir()
    before, after = ([decode_record(raw) for raw in read_records(path)] for path in (first, second))
    assert after == [replace(channel, restored=True) for channel in before]
    assert len(before) == len(State)


def test_list_and_verify_recognise_a_damaged_backup(operator: Operator) -> None:
    """`list` shows the backups of a configuration or a directory; `verify` checks each, and fails if one is damaged."""
    operator.runs("create", operator.config)
    (good,) = operator.backups()
    bad = good.with_name("paychan-debug-20200101T000000Z.backup")
    bad.write_bytes(good.read_bytes()[:-100])

    for place in (operator.config, good.parent):
        output = operator.runs("list", place)
        assert re.search(rf"{bad.name} +damaged.*{good.name} +6 +30,000", output, re.DOTALL)
    assert f"good {good}" in operator.runs("verify", good)
    output = operator.runs("verify", bad, good, status=1)
    assert f"{bad} is not a backup, or is damaged" in output
    assert f"good {good}" in output


def test_fault_58_every_command_prints_json(operator: Operator) -> None:
    """With --json each command prints one JSON value: what it did, or the error."""
    made = json.loads(operator.runs("create", operator.config, "--json"))
    (backup,) = operator.backups()
    assert (made["path"], made["manifest"]["records"]) == (str(backup), len(State))
    assert json.loads(operator.runs("list", operator.config, "--json")) == [made]
    bad = backup.with_name("paychan-debug-20200101T000000Z.backup")
    bad.write_bytes(backup.read_bytes()[:-100])
    damaged, good = json.loads(operator.runs("verify", bad, backup, "--json", status=1))
    assert (good, damaged["code"], damaged["path"]) == (made, "damaged", str(bad))
    assert set(json.loads(operator.runs("restore", operator.config, backup, "--json", status=1))) == {"code", "error"}

    store = operator.state / "store"
    store.rename(operator.home / "lost")
    assert json.loads(operator.runs("restore", operator.config, backup, "--json"))["path"] == str(store)
    found = json.loads(operator.runs("salvage", operator.config, "--to", operator.home / "salvaged", "--json"))
    assert (found["manifest"]["records"], found["record_lost"], found["older"]) == (len(State), [], [])


@pytest.mark.parametrize(
    "arguments",
    [
        ("backup", "create", "nowhere.toml"),
        ("backup", "list", "nowhere.toml"),
        ("backup", "prune", "nowhere.toml", "--keep", 1),
        ("backup", "salvage", "nowhere.toml"),
        ("channel", "pay", "nothing", 1, "--wallet", "."),
        ("channel", "list", "--wallet", "server.toml"),
        ("channels", "list", "server.toml"),
        ("channels", "show", "server.toml", "x"),
        ("channels", "close", "nowhere.toml", "x"),
        ("channels", "deposits", "server.toml"),
        ("settle", "--offline", "nowhere.backup", "--config", "server.toml"),
        ("settle", "--offline", "nowhere.backup", "--config", "nowhere.toml"),
        ("withdraw", "server.toml"),
    ],
    ids=lambda words: " ".join(map(str, words[:3])),
)
def test_fault_58_errors_are_json_too(operator: Operator, arguments: tuple[object, ...]) -> None:
    """With --json an error is an object with a code and a sentence, and nothing else is printed."""
    operator.home.chmod(0o700)
    command = [PAYCHAN, *map(str, arguments), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=operator.home)

    assert done.returncode in (1, 2), done
    assert {"code", "error"} <= set(json.loads(done.stdout))
    assert done.stderr == ""


@pytest.mark.parametrize("arguments", [("status",), ("settings",), ("audit", "show")], ids=" ".join)
def test_fault_58_errors_of_the_signer_s_commands_are_json_too(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    """With --json the signer's commands print their errors as JSON, too."""
    command = [PAYCHAN.with_name("paychan-signer"), *arguments, "nowhere.toml", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)

    assert done.returncode == 2
    assert {"code", "error"} <= set(json.loads(done.stdout))
    assert done.stderr == ""


def test_fault_58_old_backups_are_removed(operator: Operator) -> None:
    """`prune` keeps the newest readable ones of each network; damaged ones are neither counted nor removed."""
    operator.runs("create", operator.config)
    (newest,) = operator.backups()
    older = [newest.with_name(f"paychan-debug-2020010{day}T000000Z.backup") for day in (1, 2, 3)]
    for path in older:
        path.write_bytes(newest.read_bytes())
    damaged = newest.with_name("paychan-debug-20200104T000000Z.backup")
    damaged.write_bytes(newest.read_bytes()[:40])
    other = newest.with_name("paychan-test-20200101T000000Z.backup")
    other.write_bytes(newest.read_bytes().replace(b"debug", b"other", 1))

    assert "keep" in operator.runs("prune", operator.config, status=2)
    output = operator.runs("prune", operator.config, "--keep", 2)

    assert [path for path in older if path.exists()] == older[2:]
    assert f"removed {older[0]}" in output
    assert newest.exists()
    assert damaged.exists()
    assert other.exists()
    assert json.loads(operator.runs("prune", newest.parent, "--keep", 1, "--json")) == {"removed": [str(older[2])]}


def test_nothing_is_overwritten(operator: Operator) -> None:
    """Restoring over a store is refused, and the message says what to do."""
    operator.runs("create", operator.config)
    output = operator.runs("restore", operator.config, operator.backups()[0], status=1)

    assert "is not empty and is not overwritten: move it away" in output


def test_another_network_is_refused(operator: Operator) -> None:
    """A backup of the debug network cannot be restored as a store of the live network."""
    operator.runs("create", operator.config)
    live = operator.home / "live.toml"
    chain = '[chain]\nbackend = "electrum"\nurl = "tcp://127.0.0.1:50001"\n'
    live.write_text(f'network = "live"\nstate_dir = "{operator.home / "live"}"\n{chain}')
    output = operator.runs("restore", live, operator.backups()[0], status=1)

    assert "holds channels of the debug network, the configuration says live" in output
    assert not (operator.home / "live").exists()


def test_a_store_in_use_is_named(operator: Operator) -> None:
    """The store of a process that answers no requests is not backed up."""
    store = LevelDbStore.open(operator.state / "store", "debug")
    output = operator.runs("create", operator.config, status=1)
    asyncio.run(store.close())

    assert re.search(r"in use by process \d+ \(.*\): stop it", output)
    assert operator.backups() == []


def test_a_backup_to_a_file_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    """`--to` names a file: neither the running server nor the files of a stopped one make a backup."""
    with System(tmp_path) as system:
        (tmp_path / "file").write_text("mine")
        for make in ("create", "salvage"):
            command = [PAYCHAN, "backup", make, system.server_file, "--to", tmp_path / "file"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert (done.returncode, done.stdout) == (1, "")
            assert "file: Not a directory; check the path" in done.stderr
        assert list((system.state / "backups").glob("*")) == []
        done = subprocess.run(
            [PAYCHAN, "backup", "create", system.server_file, "--to", tmp_path / "usb"], capture_output=True, check=True
        )
        (kept,), (copy,) = (list(place.iterdir()) for place in (system.state / "backups", tmp_path / "usb"))
        assert kept.read_bytes() == copy.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "status", "sentence"),
    [
        (("create", "nowhere.toml"), 2, "nowhere.toml: no such file. This command reads the settings of the server"),
        (("list", "nowhere.toml"), 2, "nowhere.toml: no such file. This command reads the settings of the server"),
        (("list", "."), 1, "state/backups; `"),
        (("verify", "nowhere.backup"), 1, "nowhere.backup: No such file or directory; check the path"),
        (("verify", "server.toml"), 1, "server.toml is not a backup, or is damaged"),
        (("restore", "server.toml", "nowhere.backup"), 1, "nowhere.backup: No such file or directory"),
        (("restore", "old.backup", "server.toml"), 2, "the settings come first: "),
        (("restore", "server.toml", "server.toml"), 1, "server.toml is not a backup, or is damaged"),
        (("create", "server.toml", "--to", "server.toml"), 1, "server.toml: Not a directory"),
    ],
)
def test_mistakes_get_one_sentence(operator: Operator, arguments: tuple[str, ...], status: int, sentence: str) -> None:
    """For a missing file or one of another kind, the command prints one line that names it, and ends."""
    output = operator.runs(*arguments, status=status)

    assert sentence in output
    assert output.count("\n") == 1


def test_a_server_without_a_store_has_no_backup(tmp_path: Path) -> None:
    """Before the first start there is nothing to back up, and the command does not create a store."""
    operator = Operator(tmp_path)
    output = operator.runs("create", operator.config, status=1)

    assert "there is no store in" in output
    assert not operator.state.exists()


@pytest.mark.parametrize("command", ["create", "verify", "restore", "salvage", "list", "prune"])
def test_every_command_has_an_example(operator: Operator, command: str) -> None:
    """`--help` shows an example command line."""
    assert f"paychan backup {command} " in operator.runs(command, "--help")
