"""Keys in a token: made there, unable to leave it, found by their identifiers. All of it runs in the token's process.

There are four: the reserve's, the server's identity key, the root of all channels' keys (`derived_keys`), and the key
that all channels share with `pkcs11.keys = "one"`. Earlier releases made a key pair for each channel; it settles the channels that are still
open. Its CKA_ID is the digest of expiry and client key. No key is made for a channel any more: strangers would fill the
token. Every signature is verified before it is sent: a faulty token must cause no more than an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import sha256
from typing import Protocol

from coincurve import PublicKey

from paychan.protocol.types import UnixTime
from signer.config import SignerConfig
from signer.keys.ring import KeysFailed, SigningKey
from signer.secret.sources import Sources, read_secret
from signer.token.constants import Code, CryptokiError, Mechanism, ObjectClass
from signer.token.cryptoki import Library, Session
from signer.token.curve import der_signature
from signer.token.objects import KeyName, StoredKey, handles, look_up, make_key, read_keys
from signer.token.sessions import Sessions, TokenError, find_slot

_CHANNEL_LABEL = b"paychan channel "
_HANDLE_GONE = {Code.KEY_HANDLE_INVALID, Code.OBJECT_HANDLE_INVALID}

RESERVE = KeyName.single(b"reserve")
IDENTITY = KeyName.single(b"identity")
ROOT = KeyName.single(b"root")
"""The key that channel keys are derived from."""

ALL_CHANNELS = KeyName.single(b"channels")


def channel_name(client_key: bytes, expiry: UnixTime) -> KeyName:
    """Name the key of one channel. The label has the expiry, for an operator who deletes keys of old channels."""
    digest = sha256(expiry.to_bytes(4, "big") + client_key).digest()
    return KeyName(digest, _CHANNEL_LABEL + f"{expiry} {digest[:16].hex()}".encode())


class TokenKey:
    """A key pair in the token."""

    __slots__ = ("_handle", "_identifier", "_public_key", "_sessions", "public_key")

    def __init__(self, sessions: Sessions, identifier: bytes, handle: int, public_key: bytes) -> None:
        self._sessions = sessions
        self._identifier = identifier
        self._handle = handle
        self._public_key = PublicKey(public_key)
        self.public_key = public_key

    def sign(self, digest: bytes) -> bytes:
        """Sign; each call gives another signature, because the token chooses the nonce."""
        return self._sessions.run(lambda session, _again: self._sign(session, digest))

    def _sign(self, session: Session, digest: bytes) -> bytes:
        """Sign. After a new login the handle may be invalid or another key's: then the signature does not verify."""
        signature = self._sign_with(session, self._handle, digest)
        if signature is not None:
            return signature
        for handle in handles(session, ObjectClass.PRIVATE_KEY, self._identifier):
            signature = self._sign_with(session, handle, digest)
            if signature is not None:
                self._handle = handle
                return signature
        raise CryptokiError(Code.SIGNATURE_INVALID, "C_Sign")

    def _sign_with(self, session: Session, handle: int, digest: bytes) -> bytes | None:
        try:
            signature = der_signature(session.sign(handle, digest))
        except CryptokiError as error:
            if error.code not in _HANDLE_GONE:
                raise
            return None
        except ValueError:
            return None
        return signature if self._public_key.verify(signature, digest, hasher=None) else None


class Token:
    """All keys of this signer in one token. Any thread may sign; no other process makes keys for the same channels.

    It keeps all keys in memory, about a kilobyte each: SoftHSM takes a second to find one of 10,000.
    """

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions
        self._keys: dict[bytes, TokenKey] = {}

    def load(self) -> None:
        """Read all keys at once, which takes as long as looking up a few.

        Raises:
            KeysFailed: the token failed, or one of the keys is not protected.
        """
        for key in self._sessions.run(lambda session, _again: read_keys(session)):
            self._adopt(key)

    @property
    def side_by_side(self) -> int:
        """Number of threads that can use it at the same time."""
        return self._sessions.count

    def public_keys(self) -> Iterator[tuple[bytes, bytes]]:
        """Yield identifier and public key of all keys. Call it before other threads make more."""
        return ((identifier, key.public_key) for identifier, key in self._keys.items())

    def key(self, identifier: bytes) -> TokenKey:
        """Return an existing key. Raises `KeysFailed`."""
        found = self._keys.get(identifier)
        if found is None:
            msg = f"the token has no key {identifier.hex()}"
            raise KeysFailed(msg)
        return found

    def find(self, name: KeyName) -> TokenKey | None:
        """Return a key, or None."""
        return self._keys.get(name.identifier)

    def find_or_make(self, name: KeyName) -> TokenKey:
        """Return a key; make it if there is none. For one thread at a time. Raises `KeysFailed`."""
        key = self.find(name)
        if key is None:
            # The second try looks first: the first may have made the key before it failed.
            key = self._adopt(
                self._sessions.run(
                    lambda session, again: (look_up(session, name) if again else None) or make_key(session, name)
                )
            )
        return key

    def close(self) -> None:
        """Close the sessions."""
        self._sessions.close()

    def _adopt(self, stored: StoredKey) -> TokenKey:
        key = TokenKey(self._sessions, stored.name.identifier, stored.handle, stored.public_key)
        self._keys[stored.name.identifier] = key
        return key


class Holder(Protocol):
    """Holds keys by their names: a `client.RemoteToken`."""

    def find(self, name: KeyName) -> SigningKey | None:
        """Return a key, or None."""

    def find_or_make(self, name: KeyName) -> SigningKey:
        """Return a key; make it if there is none. Raises `KeysFailed`."""


class TokenKeys:
    """A generation of keys in the token, as policies see it: one for all channels, or (formerly) one per channel."""

    __slots__ = ("_per_channel", "_token")

    def __init__(self, token: Holder, *, per_channel: bool) -> None:
        self._token = token
        self._per_channel = per_channel

    def channel_key(self, client_key: bytes, expiry: UnixTime, *, create: bool) -> SigningKey | None:
        name = channel_name(client_key, expiry) if self._per_channel else ALL_CHANNELS
        return self._token.find_or_make(name) if create else self._token.find(name)

    def destination_key(self, client_key: bytes, expiry: UnixTime) -> None:
        """The operator always configures the destination."""

    def reserve_key(self) -> SigningKey:
        return self._token.find_or_make(RESERVE)

    def identity_key(self) -> SigningKey:
        return self._token.find_or_make(IDENTITY)


def read_pin_and_open(config: SignerConfig) -> Token:
    """Get the PIN from its source, and open the token.

    Raises:
        NoSecret: there is no PIN.
        TokenError: the token can't be used.
    """
    settings = config.pkcs11
    pin = Sources("pin", f"token {settings.token!r}", "pkcs11.pin_file", settings.pin_file)
    with read_secret(pin) as secret:
        return open_token(config, secret.value)


def open_token(config: SignerConfig, pin: bytearray) -> Token:
    """Open the token that the configuration names, and read all its keys. Copies the PIN; the caller wipes its own.

    Raises:
        TokenError: the token can't be used; the text says how to mend it.
    """
    settings = config.pkcs11
    try:
        library = Library(settings.module)
        slot = find_slot(library, settings.token)
        missing = [mechanism.name for mechanism in Mechanism if not library.supports(slot, mechanism)]
        if missing:
            raise TokenError(key="pkcs11.token", reason=f"it lacks {', '.join(missing)}: it can't hold secp256k1 keys")
        wait_seconds = config.socket.request_seconds
        sessions = Sessions(library, settings.token, pin, sessions=settings.sessions, wait_seconds=wait_seconds)
        token = Token(sessions)
        token.load()
    except OSError as error:
        raise TokenError(key="pkcs11.module", reason=f"can't be loaded: {error}") from None
    except CryptokiError as error:
        raise TokenError(key="pkcs11.module", reason=f"{settings.module} fails: {error}") from None
    except KeysFailed as error:
        raise TokenError(key="pkcs11.token", reason=str(error)) from None
    return token
