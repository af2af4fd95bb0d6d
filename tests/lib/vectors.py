"""The vectors in `tests/vectors/`, which other implementations produced, as values of the core's own types.

`JS_CASES` come from the original JavaScript client, `HASKELL_CASES` from the original Haskell test data generator.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from coincurve import PrivateKey

from paychan.protocol.address import decode_address
from paychan.protocol.kinds.base import ChannelTerms, make_terms
from paychan.protocol.payment import Payment, decode_v1
from paychan.protocol.settlement import Claim
from paychan.protocol.types import Network, OutPoint, Sat

DIRECTORY = Path(__file__).parents[1] / "vectors"


class Case(NamedTuple):
    """One channel of a vector file; `raw` is its JSON object, for parts that have no type of their own."""

    raw: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.raw["id"])

    @property
    def network(self) -> Network:
        return Network(self.raw["network"])

    @property
    def client_key(self) -> PrivateKey:
        """The client's private key; those of the Haskell vectors are not known."""
        return PrivateKey(bytes.fromhex(self.raw["client"]["privkey_hex"]))

    @property
    def server_key(self) -> PrivateKey:
        return PrivateKey(bytes.fromhex(self.raw["server"]["privkey_hex"]))

    @property
    def terms(self) -> ChannelTerms:
        raw = self.raw
        if "client" in raw:
            server, client = raw["server"]["pubkey_hex"], raw["client"]["pubkey_hex"]
        else:
            server, client = raw["server_pubkey_hex"], raw["client_pubkey_hex"]
        return make_terms(bytes.fromhex(server), bytes.fromhex(client), raw["exp_time"])

    @property
    def outpoint(self) -> OutPoint:
        return OutPoint.parse(self.raw["funding_txid"], self.raw["funding_vout"])

    @property
    def funding_sat(self) -> Sat:
        return Sat(self.raw["funding_value"])

    @property
    def change_script(self) -> bytes:
        return decode_address(self.raw["change_address"], self.network)

    @property
    def payments(self) -> list[dict[str, Any]]:
        return list(self.raw["payments"])

    def claim(self, payment: Payment | None = None) -> Claim:
        """Return the sum that the channel owes the server after a payment; default: its last one."""
        newest = payment or decode_v1(self.payments[-1]["payload_base64url"])
        return Claim(self.terms, self.outpoint, self.funding_sat, self.change_script, newest)


def read_vectors(name: str) -> Any:
    """Load a file of `tests/vectors/`."""
    return json.loads((DIRECTORY / name).read_text())


JS_CASES = [Case(raw) for raw in read_vectors("rbpcp_v1.json")["cases"]]
HASKELL_CASES = [Case(raw) for raw in read_vectors("rbpcp_v1_haskell.json")["cases"]]
HASKELL_DEBUG_FUNDING: dict[str, Any] = read_vectors("rbpcp_v1_haskell.json")["debug_funding"]
