"""Channel keys derived from one key in the token: correct, strictly encoded, and not stored there."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest
from coincurve import PrivateKey, PublicKey
from hypothesis import given
from hypothesis import strategies as st

from paychan.protocol.keys import GROUP_ORDER
from paychan.protocol.payment import encoding_problem
from paychan.protocol.types import UnixTime
from paychan.protocol.wire.signer_messages import KeyReply, KeyRequest, SettlementReply
from signer.config import load_signer_config
from signer.keys.ring import KeyRing, KeysFailed, SoftKey
from signer.token.curve import der_numbers, der_signature
from signer.token.derived_keys import DerivedKey, factor, generations
from signer.token.keys import Token, TokenKey, TokenKeys, channel_name, open_token
from signer.token.objects import KeyName
from tests.lib import background
from tests.lib.kernel import interpreter_accepts
from tests.lib.signer_process import SignerProcess
from tests.lib.softhsm import PIN, SoftHsm, finalize, softhsm
from tests.signer.messages import CLIENT_KEY, EXPIRY, make_fundings
from tests.signer.talking import ask
from tests.signer.test_pkcs11_process import settlement

SCALARS = st.integers(1, GROUP_ORDER - 1)


@given(SCALARS, SCALARS, st.binary(min_size=32, max_size=32))
def test_fault_64_a_derived_signature_is_one_of_the_derived_key(d: int, t: int, digest: bytes) -> None:
    """For any root, factor and digest: the key is that of t·d, and its signature verifies, with low S, in strict DER."""
    derived = DerivedKey(SoftKey(PrivateKey(d.to_bytes(32, "big"))), t)

    signature = background.run(derived.sign, digest)

    private = PrivateKey((d * t % GROUP_ORDER).to_bytes(32, "big"))
    assert derived.public_key == private.public_key.format()
    assert encoding_problem(signature) is None
    assert private.public_key.verify(signature, digest, hasher=None)


@given(SCALARS, SCALARS)
def test_numbers_of_a_signature_are_read_as_written(r: int, s: int) -> None:
    """R stays the same, s is the lower of the two that verify."""
    assert der_numbers(der_signature(r.to_bytes(32, "big") + s.to_bytes(32, "big"))) == (r, min(s, GROUP_ORDER - s))


def test_factors_depend_on_all_that_they_are_made_of() -> None:
    """Root, client key and expiry each change the factor; it never changes between releases."""
    other = PrivateKey(bytes(31) + b"\x05").public_key.format()
    made = [
        factor(root, client, UnixTime(expiry))
        for root in (CLIENT_KEY, other)
        for client in (CLIENT_KEY, other)
        for expiry in (EXPIRY, EXPIRY + 1)
    ]

    assert len(set(made)) == 8
    assert f"{made[0]:064x}" == FROZEN_FACTOR


FROZEN_FACTOR = "c613b3cad246b575a071e7a8b5ba425369fd64290eae78d7eb62fe818decea02"
"""If this changed, the keys of open channels would be lost."""


async def test_a_wrong_signature_of_the_token_is_an_error() -> None:
    """A token that signs another digest, or with another key, gives an error."""

    class Wrong(SoftKey):
        async def sign(self, digest: bytes) -> bytes:
            return await super().sign(sha256(digest).digest())

    with pytest.raises(KeysFailed):
        await DerivedKey(Wrong(PrivateKey(bytes(31) + b"\x05")), 7).sign(bytes(32))


async def test_a_cancelled_signature_is_cancelled_in_the_queue() -> None:
    """A cancelled signature is cancelled in the token's queue too."""
    asked = asyncio.get_running_loop().create_future()

    class Slow(SoftKey):
        async def sign(self, digest: bytes) -> bytes:  # noqa: ARG002
            return await asked

    waiting = asyncio.create_task(DerivedKey(Slow(PrivateKey(bytes(31) + b"\x05")), 7).sign(bytes(32)))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait([waiting])

    assert asked.cancelled()


# --- with a token ----------------------------------------------------------------------------------------------------


@pytest.fixture
def token(tmp_path: Path) -> Iterator[SoftHsm]:
    with softhsm(tmp_path / "hsm") as made:
        yield made


def opened(token: SoftHsm) -> Token:
    file = token.directory / "signer.toml"
    file.write_text(token.signer_config)
    return open_token(load_signer_config(file), bytearray(PIN.encode()))


class KeyHere:
    """A key of a token in this process, with the interface of `RemoteKey`."""

    def __init__(self, key: TokenKey) -> None:
        self._key = key
        self.public_key = key.public_key

    async def sign(self, digest: bytes) -> bytes:
        return self._key.sign(digest)


class TokenHere:
    """A token in this process, with the interface of `RemoteToken`."""

    def __init__(self, token: Token) -> None:
        self._token = token

    def find(self, name: KeyName) -> KeyHere | None:
        found = self._token.find(name)
        return KeyHere(found) if found else None

    def find_or_make(self, name: KeyName) -> KeyHere:
        return KeyHere(self._token.find_or_make(name))


def ring(token: SoftHsm, keys: str = "per-channel") -> KeyRing:
    file = token.directory / "signer.toml"
    file.write_text(token.signer_config + f'keys = "{keys}"\n')
    settings = load_signer_config(file).pkcs11
    return KeyRing(generations(TokenHere(opened(token)), settings), b"\x51")


def test_fault_64_strangers_leave_nothing_in_the_token(token: SoftHsm, tmp_path: Path) -> None:
    """After requests for more channels than max_keys, all have separate keys, and the token has three pairs."""
    with SignerProcess(tmp_path, token.signer_config + "max_keys = 3\n") as signer:
        keys = set()
        for number in range(40):
            reply = ask(signer.socket, KeyRequest(1, CLIENT_KEY, UnixTime(EXPIRY + number)))
            assert isinstance(reply, KeyReply)
            keys.add(reply.server_key)
        assert len(keys) == 40
        log = signer.log.read_text()
    assert log.count("key made in the token") == 3

    finalize(token)
    assert len(list(opened(token).public_keys())) == 3


def test_fault_64_channels_of_earlier_releases_are_settled(token: SoftHsm, tmp_path: Path) -> None:
    """A key pair that was made for a channel still signs for it, as Bitcoin's interpreter accepts; new ones are derived."""
    old = opened(token).find_or_make(channel_name(CLIENT_KEY, EXPIRY)).public_key
    finalize(token)
    with SignerProcess(tmp_path, token.signer_config) as signer:
        new = ask(signer.socket, KeyRequest(1, CLIENT_KEY, EXPIRY))
        assert isinstance(new, KeyReply)
        assert new.server_key != old
        for key in (old, new.server_key):
            request = settlement(KeyReply(1, key, new.destination_script), channels=2)
            for funding in make_fundings(request):
                ask(signer.socket, funding)
            reply = ask(signer.socket, request)
            assert isinstance(reply, SettlementReply), reply
            for index, claim in enumerate(request.claims):
                script, transaction = claim.terms.funding_script, reply.settlement.transaction
                assert interpreter_accepts(script, transaction, index, claim.funding_sat)


def test_channels_of_the_other_mode_keep_their_keys(token: SoftHsm) -> None:
    """After a change of `pkcs11.keys`, in either direction, channels are settled with their original key."""
    for first, second in (("per-channel", "one"), ("one", "per-channel")):
        before = ring(token, first).new(CLIENT_KEY, EXPIRY)
        finalize(token)
        after = ring(token, second)
        assert after.new(CLIENT_KEY, EXPIRY).public_key != before.public_key
        found = [source.channel_key(CLIENT_KEY, EXPIRY, create=False) for source in after._sources]
        (same,) = [key for key in found if key and key.public_key == before.public_key]
        assert PublicKey(before.public_key).verify(background.run(same.sign, bytes(32)), bytes(32), hasher=None)
        finalize(token)


def test_looking_for_a_key_makes_none(token: SoftHsm) -> None:
    """In a token without a root, a look-up derives no key and makes none."""
    made = opened(token)
    assert TokenKeys(made, per_channel=True).channel_key(CLIENT_KEY, EXPIRY, create=False) is None
    assert [*made.public_keys()] == []


def test_fault_74_no_keys_are_made_in_another_token(token: SoftHsm, tmp_path: Path) -> None:
    """A token without keys, beside a ledger, is the wrong token: the start says so, and makes no key."""
    with SignerProcess(tmp_path, token.signer_config) as signer:
        assert isinstance(ask(signer.socket, KeyRequest(1, CLIENT_KEY, EXPIRY)), KeyReply)
    token.add_token("another")
    again = SignerProcess(tmp_path, token.signer_config.replace('token = "paychan"', 'token = "another"'))

    with pytest.raises(
        RuntimeError, match=r"pkcs11\.token: it holds no key of a signer, but there is .*signer\.ledger"
    ):
        again.start()
    again.file.write_text(f'state_dir = "{tmp_path}"\n{token.signer_config}')
    with again:
        assert isinstance(ask(again.socket, KeyRequest(1, CLIENT_KEY, EXPIRY)), KeyReply)


def test_fault_74_no_keys_are_made_in_a_token_with_other_keys(token: SoftHsm, tmp_path: Path) -> None:
    """A token with keys, but not those of open channels, is refused, and no root is made in it."""
    with SignerProcess(tmp_path, token.signer_config) as signer:
        assert isinstance(ask(signer.socket, KeyRequest(1, CLIENT_KEY, EXPIRY)), KeyReply)
    token.add_token("copy")
    of_copy = token.signer_config.replace('token = "paychan"', 'token = "copy"')
    (tmp_path / "other").mkdir(mode=0o700)
    with SignerProcess(tmp_path / "other", of_copy + 'keys = "one"\n'):
        pass  # it has keys now

    again = SignerProcess(tmp_path, of_copy)
    with pytest.raises(RuntimeError, match=r"pkcs11\.token: it has another key 'reserve'"):
        again.start()
    again.file.write_text(f'state_dir = "{tmp_path}"\n{token.signer_config}')
    with again:
        assert isinstance(ask(again.socket, KeyRequest(1, CLIENT_KEY, EXPIRY)), KeyReply)
