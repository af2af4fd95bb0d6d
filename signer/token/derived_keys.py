"""A key for every channel, derived from one key in the token: channels store nothing there, so strangers can't fill it.

Let P = d·G be the token's key. A channel's key is t·P with t = H(P, client key, expiry) mod n. Its private key t·d is
stored nowhere. ECDSA over z with t·d needs s = k⁻¹(z + r·t·d) = t · k⁻¹(z·t⁻¹ + r·d). So the token signs z·t⁻¹ with its
own key, and the signer multiplies its s by t. CKM_ECDSA signs any 32 bytes.

Security: a signature over z with one channel's key is a signature over z·t'/t with another's. To use it there, an
attacker needs a transaction whose digest is exactly that number: a second preimage of SHA-256 for a given t', or a
collision (2^128 tries) if the attacker chooses channels and transactions on both sides, because the digest of each
depends on its own t through the script. ECDSA itself relies on both: two transactions with one digest would break it
too. Additive tweaks (BIP32) need the nonce before the token signs, which no token reveals. The token signs only digests
that the policies accept; a process that can call it directly needs no tweak to sign anything.

P is never published, and t can't be computed without it, so keys do not link channels. P and the token are enough to
derive all keys again: no other data is needed. Each signature is verified twice: the token's in its process, the result
here.
"""

from __future__ import annotations

from functools import lru_cache
from hashlib import sha256

from coincurve import PublicKey

from paychan.protocol.keys import GROUP_ORDER
from paychan.protocol.types import UnixTime
from signer.config import Pkcs11
from signer.keys.ring import CACHED_CHILDREN, KeysFailed, KeySource, SigningKey
from signer.token.curve import der_numbers, der_signature
from signer.token.keys import ALL_CHANNELS, IDENTITY, RESERVE, ROOT, Holder, TokenKeys

_TAG = sha256(b"paychan channel key 1").digest()


def factor(root: bytes, client_key: bytes, expiry: UnixTime) -> int:
    """Return t. 0 and 1 do not occur in practice, and are refused."""
    digest = sha256(_TAG + _TAG + root + client_key + expiry.to_bytes(4, "big")).digest()
    t = int.from_bytes(digest, "big") % GROUP_ORDER
    if t < 2:
        msg = "no key for these terms"
        raise KeysFailed(msg)
    return t


class DerivedKey:
    """The token's key times a factor."""

    __slots__ = ("_factor", "_inverse", "_public_key", "_root", "public_key")

    def __init__(self, root: SigningKey, t: int) -> None:
        self._root = root
        self._factor = t
        self._inverse = pow(t, -1, GROUP_ORDER)
        self._public_key = PublicKey(root.public_key).multiply(t.to_bytes(32, "big"))
        self.public_key = self._public_key.format()

    async def sign(self, digest: bytes) -> bytes:
        """See `ring.SigningKey`."""
        return self._turned(await self._root.sign(self._asked(digest)), digest)

    def _asked(self, digest: bytes) -> bytes:
        """Compute the digest that the token signs."""
        return (int.from_bytes(digest, "big") * self._inverse % GROUP_ORDER).to_bytes(32, "big")

    def _turned(self, signature: bytes, digest: bytes) -> bytes:
        """Convert the token's signature to the channel's; a signature that does not verify is never sent."""
        r, s = der_numbers(signature)
        converted = der_signature(r.to_bytes(32, "big") + (s * self._factor % GROUP_ORDER).to_bytes(32, "big"))
        if not self._public_key.verify(converted, digest, hasher=None):
            msg = "the token's signature does not fit the channel's key"
            raise KeysFailed(msg)
        return converted


class DerivedKeys:
    """A generation of keys (`ring.KeySource`) that are all derived from one key in the token."""

    __slots__ = ("_key_of", "_token")

    def __init__(self, token: Holder) -> None:
        self._token = token
        self._key_of = lru_cache(CACHED_CHILDREN)(self._derive)

    def channel_key(self, client_key: bytes, expiry: UnixTime, *, create: bool) -> DerivedKey | None:  # noqa: ARG002 - derived
        return None if self._token.find(ROOT) is None else self._key_of(client_key, expiry)

    def destination_key(self, client_key: bytes, expiry: UnixTime) -> None:
        """The operator always configures the destination."""

    def reserve_key(self) -> SigningKey:
        return self._token.find_or_make(RESERVE)

    def identity_key(self) -> SigningKey:
        return self._token.find_or_make(IDENTITY)

    def _derive(self, client_key: bytes, expiry: UnixTime) -> DerivedKey:
        root = self._token.find_or_make(ROOT)
        return DerivedKey(root, factor(root.public_key, client_key, expiry))


def generations(token: Holder, settings: Pkcs11) -> tuple[KeySource, ...]:
    """Return the configured way of choosing keys, then all others: channels opened with them can still be settled.

    Makes the keys that must be in the token now, so that no request ever makes one. Raises `KeysFailed`.
    """
    token.find_or_make(RESERVE)
    token.find_or_make(IDENTITY)
    token.find_or_make(ALL_CHANNELS if settings.keys == "one" else ROOT)
    shared, derived = TokenKeys(token, per_channel=False), DerivedKeys(token)
    ways: tuple[KeySource, KeySource] = (shared, derived) if settings.keys == "one" else (derived, shared)
    return (*ways, TokenKeys(token, per_channel=True))
