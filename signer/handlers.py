"""From message to reply: what is asked for comes as a value, and so does every refusal. Its only I/O is the ledger's."""

from __future__ import annotations

from msgspec import structs

from paychan.protocol.errors import PaychanError
from paychan.protocol.settlement import Settlement, sign_child, sign_settlement
from paychan.protocol.signerwire import (
    ChildReply,
    ChildRequest,
    Health,
    HealthReply,
    KeyReply,
    KeyRequest,
    Refusal,
    Reply,
    Request,
    ReserveReply,
    ReserveRequest,
    SettlementReply,
    SettlementRequest,
)
from signer.keys import Keys
from signer.ledger import Ledger, LedgerFailed
from signer.policy import channel_terms, child_refusal, output_key, refusal, replacement
from signer.signed import DamagedEntry, Entries, entries_of


class Handler:
    """Answers requests with the keys it was given. Called from several threads; the ledger alone remembers anything."""

    __slots__ = ("_debug", "_key_mode", "_keys", "_ledger", "_network")

    def __init__(self, keys: Keys, ledger: Ledger, network: str, key_mode: str, *, debug: bool) -> None:
        self._keys = keys
        self._ledger = ledger
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
            case ReserveRequest():
                return ReserveReply(request.id, self._keys.reserve_key())
            case SettlementRequest() | ChildRequest():
                return self._remembering(request)

    def _key(self, request: KeyRequest) -> Reply:
        try:
            terms = channel_terms(request.client_key, request.expiry, self._keys)
        except PaychanError as error:
            return Refusal(request.id, "policy-template", str(error))
        destination = self._keys.destination_script(terms.client_key, terms.expiry)
        return KeyReply(request.id, terms.server_key, destination)

    def _remembering(self, request: SettlementRequest | ChildRequest) -> Reply:
        try:
            return self._settlement(request) if isinstance(request, SettlementRequest) else self._child(request)
        except DamagedEntry as error:
            return Refusal(request.id, "policy-replacement", str(error))
        except LedgerFailed as error:
            return Refusal(request.id, "protocol-ledger", f"the ledger of what was signed: {error}")

    def _settlement(self, request: SettlementRequest) -> Reply:
        return (
            refusal(request, self._keys)
            or self._enter(request)
            or SettlementReply(request.id, self._sign_settlement(request))
        )

    def _enter(self, request: SettlementRequest) -> Refusal | None:
        """Enter it in the ledger before anything is signed, unless what is there forbids it."""
        entries = entries_of(request)
        with self._ledger.lock:
            earlier = self._ledger.read(entries)
            refused = replacement(request, earlier)
            if refused is None and earlier != entries:
                self._ledger.write(entries)
            return refused

    def _child(self, request: ChildRequest) -> Reply:
        parent = structs.replace(request.parent, id=request.id)
        return (
            refusal(parent, self._keys)
            or child_refusal(request, self._keys, self._remembered(parent))
            or ChildReply(request.id, self._sign_child(request))
        )

    def _remembered(self, request: SettlementRequest) -> Entries:
        with self._ledger.lock:
            return self._ledger.read([claim.outpoint for claim in request.claims])

    def _sign_settlement(self, request: SettlementRequest) -> Settlement:
        def sign(index: int, digest: bytes) -> bytes:
            if index >= len(request.claims):
                return self._keys.sign_reserve(digest)
            terms = request.claims[index].terms
            return self._keys.sign(terms.client_key, terms.expiry, digest)

        return sign_settlement(request.claims, request.destination_script, request.fee_sat, sign, request.reserve)

    def _sign_child(self, request: ChildRequest) -> Settlement:
        public_key, sign = output_key(request.parent, self._keys)
        parent = self._sign_settlement(request.parent)
        return sign_child(parent, public_key, request.fee_sat, lambda _, digest: sign(digest))
