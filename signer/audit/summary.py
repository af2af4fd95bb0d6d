"""Content of requests in JSON types, for the audit log. Pure; holds nothing secret."""

from __future__ import annotations

from typing import Any

from paychan.protocol.wire.signer_messages import (
    AgainRequest,
    ChildRequest,
    FundingRequest,
    KeyRequest,
    NewestRequest,
    OtherKeysRequest,
    Request,
    SettlementRequest,
)


def about(request: Request) -> dict[str, Any]:
    """Summarise a request; txids in the byte order that wallets show."""
    match request:
        case SettlementRequest():
            return _settlement(request)
        case ChildRequest():
            return {**_settlement(request.parent), "child_fee_sat": request.fee_sat}
        case KeyRequest() | OtherKeysRequest():
            return {"client_key": request.client_key.hex(), "expiry": request.expiry}
        case FundingRequest():
            return {"transaction_bytes": len(request.transaction), "outputs": list(request.outputs)}
        case NewestRequest():
            received_sat = sum(claim.funding_sat - claim.payment.change_sat for claim in request.claims)
            return {"payments": len(request.claims), "received_sat": received_sat}
        case AgainRequest():
            return {"outpoint": str(request.outpoint)}
        case _:
            return {}


def _settlement(request: SettlementRequest) -> dict[str, Any]:
    claims = [
        {
            "outpoint": str(claim.outpoint),
            "funding_sat": claim.funding_sat,
            "change_sat": claim.payment.change_sat,
            "change_script": claim.change_script.hex(),
        }
        for claim in request.claims
    ]
    summary: dict[str, Any] = {
        "claims": claims,
        "destination": request.destination_script.hex(),
        "fee_sat": request.fee_sat,
    }
    if request.reserve is not None:
        summary["coins"] = [str(coin.outpoint) for coin in request.reserve.coins]
    return summary
