"""Middleware for the seller's own program: a price on a handler, paid over channels of a paychan server.

from paychan.sell import priced
from paychan.sell.asgi import Paywall  # or paychan.sell.wsgi; for Tornado see paychan.sell.tornado

app.add_middleware(Paywall, merchant=".paychan/debug/merchant.sock")

@app.get("/tile")
@priced(25)  # satoshi
async def tile(): ...
"""

from paychan.sell.exchange import ServerAway
from paychan.sell.pricing import PaymentDue, charge, priced, sold
from paychan.sell.requests import Price, Request

__all__ = ["PaymentDue", "Price", "Request", "ServerAway", "charge", "priced", "sold"]
