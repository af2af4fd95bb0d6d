"""The signer's keys for channels that may be opened: asked for once, and out of what strangers may ask for."""

from __future__ import annotations

from collections import OrderedDict

from actors.world import World
from paychan.protocol.errors import KeyReuse, Overloaded, SignerUnavailable, SigningFailed
from paychan.protocol.scripts import ChannelTerms, make_terms
from paychan.protocol.types import UnixTime
from paychan.signing.base import SignerAbsent, SignerBusy, SignerRefused

_KEYS_KEPT = 10_000
"""Server keys remembered, so that funding info and opening ask the signer once; about 200 bytes each."""


class ServerKeys:
    """Asks the signer, and remembers the newest keys."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._keys: OrderedDict[tuple[bytes, UnixTime], bytes] = OrderedDict()

    async def terms(self, client_key: bytes, expiry: UnixTime, *, paid: bool = False) -> ChannelTerms:
        """Combine a client's key and expiry with the server key that the signer chose for them.

        Before a request has `paid` the signer's answer comes out of what strangers may ask it for.

        Raises:
            SignerUnavailable, SigningFailed, Overloaded: no key to be had now.
            ExpiryNotATime, KeyReuse: see `make_terms`.
        """
        key = self._keys.get((client_key, expiry))
        if key is None:
            try:
                key = (await self._world.signer.public_key(client_key, expiry, settling=paid)).server_key
            except SignerBusy as error:
                raise Overloaded(waiting=error.waiting, what="questions for keys", limit=error.limit) from error
            except SignerAbsent as error:
                raise SignerUnavailable(reason=str(error)) from error
            except SignerRefused as error:
                if error.tag == "policy-template":  # key and expiry were checked, so the two keys are one
                    raise KeyReuse(server_key=client_key.hex()) from error
                raise SigningFailed(reason=str(error)) from error
            self._keys[client_key, expiry] = key
            if len(self._keys) > _KEYS_KEPT:
                self._keys.popitem(last=False)
        terms = make_terms(key, client_key, expiry)
        self._world.chain.expect(terms)
        return terms

    async def other_terms(self, client_key: bytes, expiry: UnixTime, *, paid: bool = False) -> list[ChannelTerms]:
        """Combine them with the keys that the signer chose before its newest seed or key mode. Raises like `terms`."""
        try:
            keys = await self._world.signer.other_keys(client_key, expiry, settling=paid)
        except SignerBusy as error:
            raise Overloaded(waiting=error.waiting, what="questions for keys", limit=error.limit) from error
        except SignerAbsent as error:
            raise SignerUnavailable(reason=str(error)) from error
        except SignerRefused as error:
            raise SigningFailed(reason=str(error)) from error
        return [make_terms(key, client_key, expiry) for key in keys if key != client_key]
