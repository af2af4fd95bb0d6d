"""The wallet: a payment is durable before it is sent, only its owner reads it, and processes share no channel."""

from __future__ import annotations

import gc
import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from paychan.client import (
    AmbiguousName,
    ChannelInUse,
    DamagedFile,
    LaterFile,
    NoSuchChannel,
    Payer,
    ValueUnchecked,
)
from paychan.client.flows.pay import pay
from paychan.client.limits import Limits
from paychan.client.transport.effects import Request, Response, Retry, Save
from paychan.client.wallet import Wallet
from tests.client.conftest import IMPATIENT, OpenChannel
from tests.client.liar import FUNDING_SAT, OPEN_PRICE_SAT, Liar, Lie

PAY_FOR_EVER = """
import sys
from paychan.client import Payer
channel = Payer(wallet=sys.argv[1]).channel(sys.argv[2])
while True:
    print(channel.pay(1).total_paid_sat, flush=True)
"""


def test_every_payment_is_saved_before_it_is_sent(liar: Liar, opened: OpenChannel) -> None:
    """The first effect of a payment is the durable record that holds it, the second is the request."""
    channel = opened()
    flow = pay(channel.record, 100, Limits(), IMPATIENT, drain=False, application_data="")

    first = next(flow)
    second = flow.send(None)

    assert isinstance(first, Save)
    assert first.record.signed_sat == FUNDING_SAT - OPEN_PRICE_SAT - 100
    assert isinstance(second, Request)


def test_retry_after_is_honoured_up_to_the_longest_pause(liar: Liar, opened: OpenChannel) -> None:
    """The client waits as long as the server asks; a pause above the client's limit ends the attempts at once."""
    patience = msgspec.structs.replace(IMPATIENT, attempts=3, first_pause_seconds=1.0, longest_pause_seconds=30.0)
    flow = pay(opened().record, 100, Limits(), patience, drain=False, application_data="")
    next(flow)
    flow.send(None)

    assert flow.send(Response(503, "", {"retry-after": "7"}, b"")) == Retry(7.0)
    assert isinstance(flow.send(None), Request)
    with pytest.raises(Exception, match="status 503"):
        flow.send(Response(503, "", {"retry-after": "31"}, b""))


def test_only_the_owner_can_read_the_files(opened: OpenChannel, tmp_path: Path) -> None:
    """Directory 0700, files 0600, with any umask."""
    old = os.umask(0)
    try:
        channel = opened()
        channel.pay(1)
    finally:
        os.umask(old)

    wallet = tmp_path / "wallet"
    assert stat.S_IMODE(wallet.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in wallet.iterdir()} == {0o600}
    own = [f"{channel.name}.json", f"{channel.name}.lock"]
    assert sorted(path.name for path in wallet.iterdir()) == sorted([".seed.lock", "wallet.seed", *own])


def test_the_key_is_durable_before_the_address_is_known(liar: Liar, tmp_path: Path) -> None:
    """After `new_channel` returns, another reader finds the key of the address in the wallet."""
    with Payer(liar.url, wallet=tmp_path) as payer:
        channel = payer.new_channel(hours=100)
        found = Wallet(tmp_path).read(channel.name)

    assert found.terms.funding_script == channel.record.terms.funding_script
    assert found.private_key == channel.record.private_key


def test_a_channel_in_use_is_locked(opened: OpenChannel, tmp_path: Path) -> None:
    """A second object or process cannot open a channel before the first one releases it."""
    channel = opened()
    with Payer(wallet=tmp_path / "wallet") as other:
        with pytest.raises(ChannelInUse):
            other.channel(channel.name)
        script = "import sys; from paychan.client import Payer; Payer(wallet=sys.argv[1]).channel(sys.argv[2])"
        command = [sys.executable, "-c", script, str(tmp_path / "wallet"), channel.name]
        assert "ChannelInUse" in subprocess.run(command, capture_output=True, text=True, check=False).stderr

        channel.release()

        assert other.channel(channel.name[:3]).left_sat == channel.left_sat


def test_a_dropped_channel_is_unlocked(liar: Liar, tmp_path: Path) -> None:
    """If a program drops a channel without releasing it, it can open the channel again."""
    with Payer(liar.url, wallet=tmp_path) as payer:
        name = payer.new_channel(hours=100).name
        gc.collect()

        assert payer.channel(name).name == name


def test_a_killed_program_loses_nothing(liar: Liar, opened: OpenChannel, tmp_path: Path) -> None:
    """After SIGKILL during payments, the wallet has at least the sum that the server booked, and continues."""
    channel = opened()
    channel.release()
    wallet = str(tmp_path / "wallet")
    for rounds in range(1, 4):
        command = [sys.executable, "-c", PAY_FOR_EVER, wallet, channel.name]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as program:
            assert program.stdout is not None
            for _ in range(3 * rounds):
                assert program.stdout.readline()
            program.send_signal(signal.SIGKILL)
        with Payer(wallet=wallet, patience=IMPATIENT) as payer, payer.channel(channel.name) as again:
            assert liar.received_sat <= again.paid_sat <= liar.received_sat + 1
            again.resume()
            assert again.paid_sat == liar.received_sat


def test_fault_51_a_program_killed_while_it_waits_for_an_answer_goes_on_by_itself(
    liar: Liar, opened: OpenChannel, tmp_path: Path
) -> None:
    """A payment that a killed program had sent is finished by the next program's `pay`, and paid once."""
    channel = opened()
    channel.release()
    liar.lies.append(Lie(seconds=60.0))
    wallet = str(tmp_path / "wallet")
    with subprocess.Popen([sys.executable, "-c", PAY_FOR_EVER, wallet, channel.name]) as program:
        liar.wait_for(OPEN_PRICE_SAT + 1)
        program.send_signal(signal.SIGKILL)

    with Payer(wallet=wallet, patience=IMPATIENT) as payer, payer.channel(channel.name) as again:
        receipt = again.pay(2)
    assert receipt.earlier is not None
    assert (receipt.earlier.paid_sat, receipt.earlier.repeated) == (1, True)
    assert liar.received_sat == OPEN_PRICE_SAT + 3


def test_neither_key_nor_secret_is_shown(opened: OpenChannel) -> None:
    """A traceback, a log line or a test failure shows no private key of a channel."""
    channel = opened()
    shown = f"{channel!r} {channel.record!r} {channel.record}"

    assert channel.record.private_key not in shown
    assert channel.record.secret not in shown


DAMAGES = {
    "truncated": lambda text: text[: len(text) // 2],
    "empty": lambda text: text[:0],
    "flipped digit of the key": lambda text: flip(text, "private_key"),
    "flipped digit of the server key": lambda text: flip(text, "server_key"),
    "flipped expiry": lambda text: text.replace('"expiry": 1', '"expiry": 2'),
    "later format": lambda text: text.replace('"format": 1', '"format": 2'),
    "unknown field": lambda text: text.replace('"format": 1', '"format": 1, "novelty": 3'),
    "amounts that grow": lambda text: text.replace('"acknowledged_sat": 990000', '"acknowledged_sat": 980000'),
    "more than funded": lambda text: text.replace('"funding_sat": 1000000', '"funding_sat": 900000'),
    "no outpoint": lambda text: text.replace('"funding_outpoint": "', '"funding_outpoint": "x'),
}


def flip(text: str, field: str) -> str:
    """Change one hex digit in the middle of a field."""
    place = text.index(f'"{field}": "') + len(field) + 30
    return text[:place] + format(int(text[place], 16) ^ 1, "x") + text[place + 1 :]


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_file_is_refused(opened: OpenChannel, tmp_path: Path, damage) -> None:
    """A record that contradicts itself signs nothing."""
    channel = opened()
    channel.release()
    path = tmp_path / "wallet" / f"{channel.name}.json"
    text = path.read_text()
    path.write_text(damage(text))
    assert path.read_text() != text
    with Payer(wallet=tmp_path / "wallet") as payer:
        with pytest.raises((DamagedFile, LaterFile)):
            payer.channel(channel.name)

        path.write_text(text)

        assert payer.channel(channel.name).left_sat == channel.left_sat


def test_fault_52_names_may_be_shortened_while_they_are_unique(tmp_path: Path) -> None:
    """The beginning of a name finds the one channel that has it; several or none are an error."""
    for name in ("abc1", "abd2", "abd"):
        (tmp_path / f"{name}.json").touch()
    wallet = Wallet(tmp_path)

    assert wallet.find("abc") == "abc1"
    assert wallet.find("abd") == "abd"
    for prefix in ("x", ""):
        with pytest.raises(NoSuchChannel, match="no channel"):
            wallet.find(prefix)
    with pytest.raises(AmbiguousName, match="several channels' names: abc1, abd, abd2"):
        wallet.find("ab")


def test_the_wallet_is_found_in_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """PAYCHAN_WALLET names the directory; without it, it is below the home directory."""
    monkeypatch.setenv("PAYCHAN_WALLET", str(tmp_path / "one"))
    assert Wallet().directory == tmp_path / "one"
    monkeypatch.delenv("PAYCHAN_WALLET")
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Wallet().directory == tmp_path / ".local" / "share" / "paychan" / "wallet"


def test_fault_17_a_file_without_value_sources_needs_a_check(opened: OpenChannel, tmp_path: Path) -> None:
    """The source of its funding's value is unknown, so a refund needs a check or `unchecked`."""
    channel = opened()
    channel.release()
    path = tmp_path / "wallet" / f"{channel.name}.json"
    fields = json.loads(path.read_text())
    for later in ("funding_source", "deposits", "offered_fee_sat", "paid_fee_sat"):
        del fields[later]
    path.write_text(json.dumps(fields))

    with Payer(wallet=tmp_path / "wallet") as payer:
        read = payer.channel(channel.name)
        assert (read.left_sat, read.record.deposits) == (channel.left_sat, ())
        with pytest.raises(ValueUnchecked, match="the server's word or typed"):
            read.refund()
        assert read.refund(unchecked=True).fee_sat


def test_fault_18_a_damaged_file_hides_no_other(opened: OpenChannel, tmp_path: Path) -> None:
    """`problems` names a damaged file, which hides no other channel from a program."""
    channel = opened()
    empty = tmp_path / "wallet" / "00000000.json"
    empty.touch(0o600)
    (tmp_path / "wallet" / "11111111.json").symlink_to(tmp_path / "nowhere")
    with Payer(wallet=tmp_path / "wallet") as payer:
        assert [record.name for record in payer.records()] == [channel.name]
        assert {name: error.code for name, error in payer.problems().items()} == {
            "00000000": "damaged_file",
            "11111111": "unreadable_file",
        }


def test_fault_18_a_renamed_file_stays_usable(opened: OpenChannel, tmp_path: Path) -> None:
    """A file restored under another name gives its channel that name, and the channel is found by it."""
    channel = opened()
    channel.pay(1000)
    before = channel.record
    channel.release()
    (tmp_path / "wallet" / f"{channel.name}.json").rename(tmp_path / "wallet" / "saved.json")
    with Payer(wallet=tmp_path / "wallet") as payer:
        [record] = payer.records()
        assert record == msgspec.structs.replace(before, name="saved")
        with payer.channel(record.name) as renamed:
            assert renamed.pay(1000).total_paid_sat == before.paid_sat + 1000
