"""Keys in a real token: SoftHSM through its PKCS#11 library."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from coincurve import PrivateKey, PublicKey

from paychan.protocol.payment import encoding_problem
from paychan.protocol.types import UnixTime
from signer.config import load_signer_config
from signer.keys.ring import KeysFailed
from signer.token.constants import Attribute, Code, CryptokiError
from signer.token.cryptoki import Library, Session
from signer.token.keys import Token, TokenKey, TokenKeys, open_token
from signer.token.sessions import Sessions, TokenError
from tests.lib.softhsm import PIN, SoftHsm, finalize, softhsm
from tests.signer.messages import CLIENT_KEY, EXPIRY

THREADS = 8


@pytest.fixture
def token(tmp_path: Path) -> Iterator[SoftHsm]:
    with softhsm(tmp_path / "hsm") as made:
        yield made


def opened(token: SoftHsm, more: str = "", pin: str = PIN) -> TokenKeys:
    """Keys in the token, one per channel as in old releases, so that there are many; `more` are lines of [pkcs11]."""
    return TokenKeys(opened_token(token, more, pin), per_channel="one" not in more)


def opened_token(token: SoftHsm, more: str = "", pin: str = PIN) -> Token:
    file = token.directory / "signer.toml"
    file.write_text(token.signer_config + more)
    return open_token(load_signer_config(file), bytearray(pin.encode()))


def channel(keys: TokenKeys, number: int = 0) -> TokenKey:
    """The key of one of many channels."""
    key = keys.channel_key(CLIENT_KEY, UnixTime(EXPIRY + number), create=True)
    assert isinstance(key, TokenKey)
    return key


def verified(key: TokenKey, digest: bytes) -> bytes:
    """A signature, after a check of its encoding and validity."""
    signature = key.sign(digest)
    assert encoding_problem(signature) is None
    assert PublicKey(key.public_key).verify(signature, digest, hasher=None)
    return signature


def digests(count: int) -> list[bytes]:
    return [sha256(b"%d" % number).digest() for number in range(count)]


def together(work: Any, count: int = THREADS) -> list[Any]:
    """Results of this number of threads that begin at the same time."""
    begin = threading.Barrier(count)

    def one(number: int) -> Any:
        begin.wait()
        return work(number)

    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(one, range(count)))


def sessions_of(keys: TokenKeys) -> Sessions:
    assert isinstance(keys._token, Token)
    return keys._token._sessions


def library_of(keys: TokenKeys) -> Library:
    return sessions_of(keys)._library


def slot_of(keys: TokenKeys) -> int:
    return sessions_of(keys)._slot


def test_keys_cannot_leave_the_token(token: SoftHsm) -> None:
    """Another program with the PIN can neither read nor wrap a key of the signer, nor make it extractable."""
    keys = opened(token)
    channel(keys)
    keys.reserve_key()
    command = [sys.executable, "-m", "tests.lib.tokenwitness", str(token.module), token.label, token.pin]

    seen = json.loads(subprocess.run(command, env=os.environ, check=True, capture_output=True, timeout=60).stdout)

    assert sorted(key["label"].rsplit(" ", 1)[0] for key in seen) == ["paychan", f"paychan channel {EXPIRY}"]
    for key in seen:
        assert key["flags"] == [True, False, True, True, True]
        assert key["value"] is None
        assert key["wrapped"] == "CKR_KEY_UNEXTRACTABLE"
        assert key["made extractable"] in ("CKR_ATTRIBUTE_READ_ONLY", "CKR_ACTION_PROHIBITED")
        assert key["made readable"] in ("CKR_ATTRIBUTE_READ_ONLY", "CKR_ACTION_PROHIBITED")


def test_a_key_that_could_leave_the_token_is_refused(token: SoftHsm, monkeypatch: pytest.MonkeyPatch) -> None:
    """An extractable key that a token made is destroyed, and no channel is opened with it."""
    keys = opened(token)
    generate = Session.generate

    def careless(session: Session, public: Any, private: Any) -> tuple[int, int]:
        return generate(session, public, private | {Attribute.EXTRACTABLE: True})

    monkeypatch.setattr(Session, "generate", careless)

    with pytest.raises(KeysFailed, match="CKA_EXTRACTABLE, CKA_NEVER_EXTRACTABLE"):
        channel(keys)

    monkeypatch.undo()
    session = library_of(keys).open_session(slot_of(keys))
    assert session.find({Attribute.TOKEN: True}) == []


def test_a_token_with_fewer_attributes_is_accepted(token: SoftHsm, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a token refuses an optional attribute, the key is made without it, and is protected all the same."""
    keys = opened(token)
    generate = Session.generate

    def picky(session: Session, public: Any, private: Any) -> tuple[int, int]:
        if Attribute.MODIFIABLE in private:
            raise CryptokiError(Code.ATTRIBUTE_TYPE_INVALID, "C_GenerateKeyPair")
        return generate(session, public, private)

    monkeypatch.setattr(Session, "generate", picky)

    verified(channel(keys), bytes(32))


def test_a_foreign_key_with_the_signers_label_stops_the_start(token: SoftHsm, monkeypatch: pytest.MonkeyPatch) -> None:
    """A foreign key with the signer's label that may leave the token is not used for signatures."""
    keys = opened(token)
    monkeypatch.setattr("signer.token.objects._check_protected", lambda *_: None)
    generate = Session.generate
    monkeypatch.setattr(
        Session,
        "generate",
        lambda self, public, private: generate(self, public, private | {Attribute.EXTRACTABLE: True}),
    )
    channel(keys)
    monkeypatch.undo()

    with pytest.raises(TokenError, match="may leave it") as caught:
        opened(token)

    assert caught.value.key == "pkcs11.token"


def test_signatures_verify_and_are_strict_der_with_low_s(token: SoftHsm) -> None:
    """Two hundred signatures over two hundred digests all verify, in the encoding that nodes relay."""
    key = channel(opened(token))

    signatures = {verified(key, digest) for digest in digests(200)}

    assert len(signatures) == 200


def test_every_channel_has_a_key_of_its_own(token: SoftHsm) -> None:
    """Other expiries and client keys, reserve and identity have other keys; the same terms have the same key."""
    keys = opened(token)
    other_client = PrivateKey(b"\x07" * 32).public_key.format()
    made = [channel(keys, number).public_key for number in range(3)]
    other = keys.channel_key(other_client, EXPIRY, create=True)
    assert other is not None

    assert len({*made, other.public_key, keys.reserve_key().public_key, keys.identity_key().public_key}) == 6
    assert channel(keys, 1).public_key == made[1]
    assert keys.destination_key(CLIENT_KEY, EXPIRY) is None


def test_a_look_up_makes_no_key(token: SoftHsm) -> None:
    """A look-up of the key of unknown terms finds none and makes none."""
    keys = opened(token)

    assert keys.channel_key(CLIENT_KEY, EXPIRY, create=False) is None
    assert keys.channel_key(CLIENT_KEY, EXPIRY, create=False) is None


@pytest.mark.parametrize("more", ["", 'keys = "one"\n'], ids=["per channel", "one for all"])
def test_keys_are_found_after_a_restart(token: SoftHsm, more: str) -> None:
    """A new start finds the keys of channels, reserve and identity, makes none, and signs with them."""
    keys = opened(token, more)
    before = [channel(keys, number).public_key for number in range(3)]
    before += [keys.reserve_key().public_key, keys.identity_key().public_key]
    finalize(token)

    keys = opened(token, more)

    found = [keys.channel_key(CLIENT_KEY, UnixTime(EXPIRY + number), create=False) for number in range(3)]
    kept = keys.reserve_key(), keys.identity_key()
    assert [key.public_key for key in [*found, *kept] if key] == before
    for key in found:
        assert key is not None
        verified(key, bytes(32))


def test_one_key_for_all_channels(token: SoftHsm) -> None:
    """With keys = "one" all channels have the same key, which is neither the reserve's nor the identity's."""
    keys = opened(token, 'keys = "one"\n')

    shared = {channel(keys, number).public_key for number in range(5)}

    assert len(shared) == 1
    assert not {keys.reserve_key().public_key, keys.identity_key().public_key} & shared


@pytest.mark.parametrize("sessions", [1, 4, THREADS])
def test_threads_sign_at_the_same_time(token: SoftHsm, sessions: int) -> None:
    """Eight threads that sign at the same time, over one to eight sessions, get only valid signatures."""
    keys = opened(token, f"sessions = {sessions}\n")
    mine = [channel(keys, number % 3) for number in range(THREADS)]

    together(lambda number: [verified(mine[number], digest) for digest in digests(50)])


def test_a_library_without_locks_is_used_by_one_thread_at_a_time(
    token: SoftHsm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the library can't lock, threads take turns: SoftHSM without locks would crash."""

    def without_locks(library: Library) -> None:
        library._functions["C_Initialize"](None)
        library.threads = False

    monkeypatch.setattr(Library, "initialize", without_locks)
    keys = opened(token)

    together(lambda number: [verified(channel(keys, number), digest) for digest in digests(20)])


def test_a_lost_session_is_replaced(token: SoftHsm) -> None:
    """After the token has closed all sessions and forgotten the login, signing and making keys still work."""
    keys = opened(token)
    key = channel(keys)

    library_of(keys).call("C_CloseAllSessions", slot_of(keys))
    verified(key, bytes(32))

    library_of(keys).call("C_CloseAllSessions", slot_of(keys))
    channel(keys, 1)

    library_of(keys).call("C_CloseAllSessions", slot_of(keys))
    together(lambda number: [verified(channel(keys, number % 2), digest) for digest in digests(10)])


def test_a_library_that_was_finalised_is_used_again(token: SoftHsm) -> None:
    """After other code in the process has finalised the library, it is initialised again, and keys are found."""
    keys = opened(token)
    made = [channel(keys, number) for number in range(3)]

    finalize(token)

    for key in reversed(made):
        verified(key, bytes(32))


def test_a_token_that_is_away_fails_and_comes_back(token: SoftHsm) -> None:
    """Without its token the signer answers with an error that names it; when the token is back, it signs."""
    key = channel(opened(token))
    tokens = token.directory / "tokens"
    tokens.rename(token.directory / "away")
    tokens.mkdir()
    finalize(token)

    with pytest.raises(KeysFailed, match="'paychan' failed"):
        key.sign(bytes(32))

    tokens.rmdir()
    (token.directory / "away").rename(tokens)
    finalize(token)
    verified(key, bytes(32))


def test_a_refused_pin_is_tried_once(token: SoftHsm) -> None:
    """A PIN that was changed meanwhile is tried once, not for every request: that would lock the token."""
    keys = opened(token)
    key = channel(keys)
    sessions_of(keys)._pin[:] = b"0" * len(PIN)
    library_of(keys).call("C_CloseAllSessions", slot_of(keys))
    logins = 0
    login = Session.login

    def counted(session: Session, pin: bytearray) -> None:
        nonlocal logins
        logins += 1
        login(session, pin)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Session, "login", counted)
        for _ in range(5):
            with pytest.raises(KeysFailed, match="CKR_PIN_INCORRECT"):
                key.sign(bytes(32))

    assert logins == 1


def test_a_hanging_call_stops_no_other_call(token: SoftHsm, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one call hangs, others are answered; when all sessions hang, the next call fails after a time limit."""
    keys = opened(token, "sessions = 2\n[socket]\nrequest_seconds = 0.3\n")
    key, slow = channel(keys), channel(keys, 1)
    hangs, go_on, sign = threading.Semaphore(0), threading.Event(), Session.sign

    def hanging(session: Session, handle: int, digest: bytes) -> bytes:
        if handle == slow._handle:
            hangs.release()
            go_on.wait(20)
        return sign(session, handle, digest)

    monkeypatch.setattr(Session, "sign", hanging)
    with ThreadPoolExecutor() as threads:
        first = threads.submit(verified, slow, bytes(32))
        hangs.acquire()
        for digest in digests(20):
            verified(key, digest)
        second = threads.submit(verified, slow, bytes(32))
        hangs.acquire()
        with pytest.raises(KeysFailed, match="all 2 sessions with token 'paychan' are busy"):
            key.sign(bytes(32))
        go_on.set()
        first.result()
        second.result()
    verified(key, bytes(32))


@pytest.mark.parametrize("fault", [lambda _raw: bytes(64), lambda raw: raw[:-1], lambda raw: raw[::-1]])
def test_a_wrong_signature_is_never_returned(token: SoftHsm, monkeypatch: pytest.MonkeyPatch, fault: Any) -> None:
    """If a token returns anything but a signature of the key over the digest, the result is an error."""
    key = channel(opened(token))
    sign = Session.sign
    monkeypatch.setattr(Session, "sign", lambda *arguments: fault(sign(*arguments)))

    with pytest.raises(KeysFailed, match="CKR_SIGNATURE_INVALID"):
        key.sign(bytes(32))


def test_handles_that_the_token_gave_to_other_keys_are_noticed(token: SoftHsm) -> None:
    """If a handle now belongs to another key, the right handle is looked up, and signs."""
    keys = opened(token)
    first, second = channel(keys), channel(keys, 1)
    first._handle, second._handle = second._handle, first._handle

    verified(first, bytes(32))
    verified(second, bytes(32))


def test_faults_of_the_token_are_reported(token: SoftHsm, tmp_path: Path) -> None:
    """A wrong PIN, label or library, and two tokens with one label, are reported with the setting and the facts."""
    text = token.signer_config
    other = tmp_path / "other.toml"

    def problem(config: str, pin: str = PIN) -> tuple[str, str]:
        other.write_text(config)
        with pytest.raises(TokenError) as caught:
            open_token(load_signer_config(other), bytearray(pin.encode()))
        return caught.value.key, str(caught.value)

    key, reason = problem(text, "0000000000")
    assert key == "pkcs11.pin_file"
    assert "CKR_PIN_INCORRECT" in reason

    key, reason = problem(text.replace('token = "paychan"', 'token = "elsewhere"'))
    assert key == "pkcs11.token"
    assert reason == "0 tokens have the label 'elsewhere'; present labels: 'paychan'"

    for module in ("/nowhere.so", "libm.so.6"):
        key, reason = problem(text.replace(str(token.module), module))
        assert key == "pkcs11.module"
        assert module in reason

    finalize(token)
    token.add_token(token.label)
    key, reason = problem(text)
    assert key == "pkcs11.token"
    assert reason.startswith("2 tokens have the label 'paychan'")


def test_holders_of_the_pin_do_not_show_it(token: SoftHsm) -> None:
    """`repr` and `str` of all objects of the token, and its errors, contain no PIN; `close` wipes it."""
    keys = opened(token)
    sessions = sessions_of(keys)
    holders = [keys, keys._token, sessions, channel(keys), sessions._library, sessions._idle.get()]
    assert not [holder for holder in holders if PIN in repr(holder) + str(holder)]
    sessions.close()
    assert sessions._pin == bytearray(len(PIN))
    finalize(token)
    with pytest.raises(TokenError) as caught:
        opened(token, pin="a wrong secret")
    assert "a wrong secret" not in repr(caught.value) + str(caught.value)
