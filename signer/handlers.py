"""From message to reply. No I/O: what is asked for comes as a value, and so does every refusal."""

from __future__ import annotations

from paychan.protocol.errors import PaychanError
from paychan.protocol.settlement import sign_settlement
from paychan.protocol.signerwire import (
    Health,
    HealthReply,
    KeyReply,
    KeyRequest,
    Refusal,
    Reply,
    Request,
    SettlementReply,
    SettlementRequest,
)
from signer.keys import Keys
from signer.policy import channel_terms, refusal


class Handler:
    """Answers requests with the keys it was given. Called from several threads; keeps nothing between requests."""

    __slots__ = ("_debug", "_key_mode", "_keys", "_network")

    def __init__(self, keys: Keys, network: str, key_mode: str, *, debug: bool) -> None:
        self._keys = keys
        self._network = network
        self._key_mode = key_mode
        self._debug = debug

    def __call__(self, request: Request) -> Reply:
        """Answer any message that could be read. Whatever its fields hold, this does not raise."""
        match request:
            case Health():
                return HealthReply(request.id, self._network, self._key_mode, self._debug)
            case KeyRequest():
                return self._key(request)
            case SettlementRequest():
                return self._settlement(request)

    def _key(self, request: KeyRequest) -> Reply:
        try:
            terms = channel_terms(request.client_key, request.expiry, self._keys)
        except PaychanError as error:
            return Refusal(request.id, "policy-template", str(error))
        destination = self._keys.destination_script(terms.client_key, terms.expiry)
        return KeyReply(request.id, terms.server_key, destination)

    def _settlement(self, request: SettlementRequest) -> Reply:
        def sign(index: int, digest: bytes) -> bytes:
            terms = request.claims[index].terms
            return self._keys.sign(terms.client_key, terms.expiry, digest)

        return refusal(request, self._keys) or SettlementReply(
            request.id, sign_settlement(request.claims, request.destination_script, request.fee_sat, sign)
        )
