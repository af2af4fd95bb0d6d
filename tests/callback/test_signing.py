"""The keys that sign requests to the application: the file, its mode, two keys during a rotation."""

from __future__ import annotations

import base64
import os
import time
from pathlib import Path

import pytest
from standardwebhooks import Webhook

from paychan.callback.signing import KeyFileError, load_keys, signature_headers
from paychan.protocol.types import UnixTime

pytestmark = pytest.mark.quick

A, B = (f"whsec_{base64.b64encode(bytes([n]) * 32).decode()}" for n in (1, 2))


def _file(directory: Path, text: str, mode: int = 0o600) -> Path:
    path = directory / "callback.key"
    path.write_text(text)
    path.chmod(mode)
    return path


def test_a_key_is_drawn_once(tmp_path: Path) -> None:
    """Without a file a key is drawn; the next start reads the same one."""
    path = tmp_path / "callback.key"
    first = load_keys(path)
    assert [len(key) for key in first] == [32]
    assert load_keys(path) == first
    assert path.stat().st_mode & 0o777 == 0o600


def test_fault_48_a_receiver_with_either_key_of_a_rotation_verifies(tmp_path: Path) -> None:
    """With two keys in the file each request has two signatures."""
    keys = load_keys(_file(tmp_path, f"# new\n{B}\n\n# old\n{A}\n"))
    body = b'{"value_received":1}'
    headers = signature_headers(keys, "id:1", UnixTime(int(time.time())), body)
    for key in (A, B):
        assert Webhook(key).verify(body, headers) == {"value_received": 1}


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o666])
def test_keys_that_others_can_read_are_refused(tmp_path: Path, mode: int) -> None:
    """The message names the mode and the remedy."""
    with pytest.raises(KeyFileError, match=f"mode {mode:04o}.*chmod 600"):
        load_keys(_file(tmp_path, A, mode))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# none\n",
        "secret",
        "whsec_",
        "whsec_!!!!",
        "whsec_" + base64.b64encode(b"short").decode(),
        f"{A}\n{B}\n{A}",
    ],
)
def test_files_without_valid_keys_are_refused(tmp_path: Path, text: str) -> None:
    """The message names the file, and shows no key."""
    path = _file(tmp_path, text)
    with pytest.raises(KeyFileError) as caught:
        load_keys(path)
    assert str(path) in str(caught.value)
    assert B.removeprefix("whsec_") not in str(caught.value)


def test_a_file_that_can_not_be_read_is_named(tmp_path: Path) -> None:
    """A directory, and a place that does not exist."""
    for path in (tmp_path, tmp_path / "missing" / "callback.key"):
        with pytest.raises(KeyFileError, match=str(path)):
            load_keys(path)


def test_the_headers_are_those_of_the_standards_example() -> None:
    """The example of the Standard Webhooks specification."""
    key = base64.b64decode("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    body = b'{"test": 2432232314}'
    headers = signature_headers([key], "msg_p5jXN8AQM9LWM0D4loKWxJek", UnixTime(1614265330), body)
    assert headers["webhook-signature"] == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
    assert os.fspath(headers["webhook-timestamp"]) == "1614265330"
