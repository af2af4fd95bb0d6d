"""A wallet's backup among other files: found by its content, compared in both directions, and named."""

from __future__ import annotations

import json
from pathlib import Path

from paychan.client import Payer
from paychan.client.backup import take_backup, write_backup
from tests.client.test_backup import NOW, opened, payer, run, saved, system

__all__ = ["payer", "system"]


def test_a_backup_in_a_directory_is_found_by_its_content(payer: Payer, tmp_path: Path) -> None:
    """A newer backup without the suffix is taken; a file that may be a backup and can't be read is named."""
    opened(payer)
    usb = tmp_path / "usb"
    usb.mkdir()
    saved(payer.wallet, usb / "first.wallet")
    late = opened(payer)
    second = usb / "second"
    write_backup(take_backup(payer.wallet, NOW + 60)[0], second)
    (usb / "README.md").write_text("# Photos")
    (usb / "half").write_text(second.read_text()[:900])
    payer.close()

    done = json.loads(run("restore", usb, "--json", wallet=tmp_path / "new"))

    assert done["file"] == str(second)
    assert late.name in done["written"]
    assert [each["file"] for each in done["skipped"]] == [str(usb / "half")]
    shown = run("restore", usb, wallet=tmp_path / "other")
    assert f"skipped: {usb / 'half'}" in shown
    assert "README" not in shown


def test_a_check_names_what_only_the_backup_has(payer: Payer, tmp_path: Path) -> None:
    """A lost channel, an empty wallet and an older record are problems; a forgotten channel is none."""
    kept, lost, forgotten = opened(payer), opened(payer), payer.new_channel(hours=100)
    old = (tmp_path / "wallet" / f"{kept.name}.json").read_bytes()
    kept.pay(5)
    path = saved(payer.wallet, tmp_path / "copy.wallet")
    forgotten.forget()
    payer.close()
    assert f"Compared with {path}" in run("check", path, wallet=tmp_path / "wallet")
    (tmp_path / "wallet" / f"{lost.name}.json").unlink()
    (tmp_path / "wallet" / f"{kept.name}.json").write_bytes(old)

    done = json.loads(run("check", path, "--json", wallet=tmp_path / "wallet", status=1))

    assert done["backup"] == str(path)
    found = {each["name"]: each["error"] for each in done["problems"]}
    assert set(found) == {lost.name, kept.name}
    assert found[lost.name] == "in the backup, not in the wallet"
    assert "the wallet is older" in found[kept.name]
    shown = run("check", path, wallet=tmp_path / "empty", status=1)
    assert shown.count("not in the wallet") == 4


def test_another_kind_of_file_is_not_a_backup(payer: Payer, tmp_path: Path) -> None:
    """A text, a channel's file and a seed are not called damaged backups; a damaged one gets its own advice."""
    channel = opened(payer)
    path = saved(payer.wallet, tmp_path / "copy.wallet")
    (tmp_path / "README.md").write_text("# Wallet")
    wallet = tmp_path / "wallet"
    for other in (tmp_path / "README.md", wallet / f"{channel.name}.json", wallet / "wallet.seed"):
        shown = run("restore", other, wallet=tmp_path / "new", status=1)
        assert "not a backup of a wallet" in shown
        assert "a key" not in shown
    path.write_text(path.read_text()[:900])
    assert "Use another backup" in run("restore", path, wallet=tmp_path / "new", status=1)
