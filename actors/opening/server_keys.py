"""The signer's keys for channels that may be opened: each is requested once, within the budget of unknown clients."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from actors.context import Context
from paychan.protocol.errors import KeyReuse, Overloaded, SignerUnavailable, SigningFailed
from paychan.protocol.kinds.base import ChannelTerms, make_terms
from paychan.protocol.types import UnixTime
from paychan.signer_client.base import SignerAbsent, SignerBusy, SignerRefused

_KEYS_KEPT = 10_000
"""Most answers in the cache, which lets funding info and opening share one request; about 200 bytes each."""

_T = TypeVar("_T")
_Asked = OrderedDict[tuple[bytes, UnixTime], _T]


class ServerKeys:
    """Asks the signer for keys, and caches the newest answers.

    Until a request is `paid` (funded, signed, and paying enough) it uses the signer's budget for unknown clients.
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        self._newest: _Asked[bytes] = OrderedDict()
        self._others: _Asked[tuple[bytes, ...]] = OrderedDict()

    async def terms(self, client_key: bytes, expiry: UnixTime, *, paid: bool = False) -> ChannelTerms:
        """Combine a client's key and expiry with the server key that the signer chose for them.

        Raises:
            SignerUnavailable, SigningFailed, Overloaded: the signer gives no key now.
            ExpiryNotATime, KeyReuse: see `make_terms`.
        """
        key = self._newest.get((client_key, expiry))
        if key is None:
            with _signer_errors(client_key):
                key = (await self._context.signer.public_key(client_key, expiry, settling=paid)).server_key
            _keep(self._newest, (client_key, expiry), key)
        terms = make_terms(key, client_key, expiry)
        self._context.chain.expect(terms)
        return terms

    async def other_terms(self, client_key: bytes, expiry: UnixTime, *, paid: bool = False) -> list[ChannelTerms]:
        """Combine both with the signer's keys from before its newest seed or key mode. Raises like `terms`."""
        keys = self._others.get((client_key, expiry))
        if keys is None:
            with _signer_errors(client_key):
                keys = await self._context.signer.other_keys(client_key, expiry, settling=paid)
            _keep(self._others, (client_key, expiry), keys)
        return [make_terms(key, client_key, expiry) for key in keys if key != client_key]


def _keep(answers: _Asked[_T], asked: tuple[bytes, UnixTime], answer: _T) -> None:
    answers[asked] = answer
    if len(answers) > _KEYS_KEPT:
        answers.popitem(last=False)


@contextmanager
def _signer_errors(client_key: bytes) -> Iterator[None]:
    try:
        yield
    except SignerBusy as error:
        raise Overloaded(waiting=error.waiting, what="requests for keys", limit=error.limit) from error
    except SignerAbsent as error:
        raise SignerUnavailable(reason=str(error)) from error
    except SignerRefused as error:
        if error.tag == "policy-template":  # key and expiry were checked before, so client and server key are equal
            raise KeyReuse(server_key=client_key.hex()) from error
        raise SigningFailed(reason=str(error)) from error
