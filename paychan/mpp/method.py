"""The method `bitcoin` with the intent `session`, as the SDK defines methods. `bindings/mpp.md` is its page."""

from __future__ import annotations

from typing import Any, Literal

from mpp.methods import Method
from pydantic import BaseModel, ConfigDict, Field

from paychan.protocol.wire.mpp import INTENT, METHOD


class SessionRequest(BaseModel):
    """The request of a challenge. The wire code of paychan judges its members; names with `_` stay in the process."""

    model_config = ConfigDict(extra="ignore")

    amount: str
    currency: Literal["sat"] = "sat"
    recipient: str
    unit_type: str = Field("request", alias="unitType")
    suggested_deposit: str | None = Field(None, alias="suggestedDeposit")
    method_details: dict[str, Any] = Field(alias="methodDetails")


class SessionPayload(BaseModel):
    """The payload of a credential. The wire code of paychan judges its members."""

    model_config = ConfigDict(extra="allow")

    action: str


SESSION: Method[SessionRequest, SessionPayload] = Method(
    name=METHOD, intent=INTENT, request_model=SessionRequest, payload_model=SessionPayload
)
