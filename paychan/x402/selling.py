"""The scheme `batch-settlement` for the SDK's middleware, settled by the facilitator of a paychan server.

The flow is `upfront`: one `/settle` books the payment and the price before the handler runs, so no number of requests at
once is served for one price. If the handler raises or answers 5xx, the price becomes credit of the payer again.
"""

from __future__ import annotations

import logging
from typing import Any

import httpx
from x402 import x402ResourceServer, x402ResourceServerSync
from x402.extensions.payment_identifier import declare_payment_identifier_extension
from x402.http import FacilitatorConfig, HTTPFacilitatorClient, HTTPFacilitatorClientSync
from x402.http.facilitator_client_base import AuthHeaders
from x402.http.types import PaymentOption, RouteConfig
from x402.interfaces import PaymentFlowConfig
from x402.schemas import AssetAmount, PaymentRequirements, SupportedKind

from paychan.client.amounts import satoshi
from paychan.protocol.wire import x402
from paychan.protocol.wire.offers import asset_of
from paychan.protocol.wire.x402_outcomes import DYNAMIC

_RELEASE_SECONDS = 10.0

log = logging.getLogger("paychan.x402")


class SellingScheme:
    """Prices in satoshi, and offers with the terms that the facilitator names.

    Args:
        release: called with the payment of a request whose handler failed after it was settled.
    """

    scheme = x402.SCHEME
    default_asset_transfer_method = x402.TRANSFER_METHOD
    payment_flows: dict[str, PaymentFlowConfig] = {  # noqa: RUF012 - the SDK's name of a constant
        x402.TRANSFER_METHOD: {"supported": ("upfront",), "default": "upfront"}
    }
    dynamic_extra_fields: list[str] = list(DYNAMIC)  # noqa: RUF012

    def __init__(self, release: Any = None) -> None:
        if release is not None:
            self.on_verified_payment_canceled = release

    def parse_price(self, price: Any, network: str) -> AssetAmount:
        """Return a price in satoshi.

        Raises:
            ValueError: the price is money, such as `"$0.01"`, or of another asset.
        """
        named = price if isinstance(price, AssetAmount) else None
        if isinstance(price, dict):
            named = AssetAmount.model_validate(price)
        if named is None or named.asset != asset_of(network):
            msg = f"price {price!r}: want satoshi, as {{'amount': '25', 'asset': {asset_of(network)!r}}}"
            raise ValueError(msg)
        return AssetAmount(amount=str(satoshi(int(named.amount), "amount")), asset=named.asset, extra=named.extra)

    def enhance_payment_requirements(
        self,
        requirements: PaymentRequirements,
        supported_kind: SupportedKind,
        extensions: list[str],  # noqa: ARG002 - the SDK's signature
    ) -> PaymentRequirements:
        """Add the terms on which a channel is opened."""
        extra = {**(supported_kind.extra or {}), **requirements.extra}
        return requirements.model_copy(update={"extra": extra})

    def get_asset_decimals(self, asset: str, network: str) -> int:  # noqa: ARG002
        """Return 0: amounts are satoshi."""
        return 0


class Seller:
    """A resource server of the SDK (`server`), and the routes that it sells (`route`).

    Args:
        url: the merchant listener of the paychan server, such as http://127.0.0.1:8402.
        token: content of its token file.
        blocking: for the middleware of Flask.

    Raises:
        httpx.HTTPError, ValueError: the facilitator does not answer.
    """

    def __init__(self, url: str, token: str, *, blocking: bool = False) -> None:
        self._url, self._token = url.rstrip("/"), token
        config = FacilitatorConfig(url=self._url, auth_provider=self)
        facilitator_type: Any = HTTPFacilitatorClientSync if blocking else HTTPFacilitatorClient
        server_type: Any = x402ResourceServerSync if blocking else x402ResourceServer
        self._facilitator = facilitator_type(config)
        supported = self._facilitator.get_supported()
        (self.network,) = {each.network for each in supported.kinds if each.scheme == x402.SCHEME}
        self.identity = supported.signers["bip122:*"][0]
        self.server = server_type(self._facilitator)
        self.server.register(self.network, SellingScheme(self._release if blocking else self._release_async))

    def get_auth_headers(self) -> AuthHeaders:
        """Return the token for each endpoint (the SDK's `AuthProvider`)."""
        own = {"Authorization": f"Bearer {self._token}"}
        return AuthHeaders(verify=own, settle=own, supported=own)

    def route(self, price_sat: int, description: str = "", mime_type: str = "") -> RouteConfig:
        """Return a route for the SDK's middleware, with its price in satoshi."""
        option = PaymentOption(
            scheme=x402.SCHEME,
            pay_to=self.identity,
            price=AssetAmount(amount=str(satoshi(price_sat, "price_sat")), asset=asset_of(self.network)),
            network=self.network,
            max_timeout_seconds=x402.MAX_TIMEOUT_SECONDS,
        )
        named = {x402.IDENTIFIER: declare_payment_identifier_extension(required=False)}
        return RouteConfig(accepts=option, description=description, mime_type=mime_type, extensions=named)

    async def aclose(self) -> None:
        """Close the connections to the paychan server."""
        await self._facilitator.aclose()

    def close(self) -> None:
        """Close the connections of a blocking seller."""
        self._facilitator.close()

    def _release(self, context: Any) -> None:
        if not _failed(context):
            return
        try:
            response = httpx.post(self._url + "/unsettle", **self._unsettle(context))
            response.raise_for_status()
        except httpx.HTTPError as error:
            log.warning("the price of a failed request was not given back: %s", error)

    async def _release_async(self, context: Any) -> None:
        if not _failed(context):
            return
        try:
            async with httpx.AsyncClient() as client:
                response = await client.post(self._url + "/unsettle", **self._unsettle(context))
                response.raise_for_status()
        except httpx.HTTPError as error:
            log.warning("the price of a failed request was not given back: %s", error)

    def _unsettle(self, context: Any) -> dict[str, Any]:
        body = {
            "x402Version": 2,
            "paymentPayload": context.payment_payload.model_dump(by_alias=True, exclude_none=True),
            "paymentRequirements": context.requirements.model_dump(by_alias=True, exclude_none=True),
        }
        return {
            "json": body,
            "headers": {"Authorization": f"Bearer {self._token}"},
            "timeout": _RELEASE_SECONDS,
        }


def _failed(context: Any) -> bool:
    """Say whether a handler raised, or answered 5xx, after its request was settled."""
    return "before-handler" in context.settled_phases and (context.response_status or 500) >= 500
