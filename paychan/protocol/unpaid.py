"""Refusals of requests that must be paid: leaves of the branch `Unpaid` of `errors.py`, and what they ask of the payer.

Parsers of `wire/x402.py` and `wire/mpp.py` raise them on both sides: a server about a payment, a payer about an offer.
`credit.py` refuses charges.
"""

from __future__ import annotations

from paychan.protocol.errors import BadRequest, Conflict, Failed, NotFound, Unavailable, Unpaid


class MalformedPayment(Unpaid):
    code, text = "malformed_payment", "{field}: {reason}"


class PaymentTooLarge(Unpaid):
    code, text = "payment_too_large", "{field} is too large: got {got_bytes} bytes, limit {limit_bytes} bytes"


class PaymentUnsupported(BadRequest):
    code, text = "payment_unsupported", "{field} {got} is not supported, want {want}"


class TwoPayments(BadRequest):
    code, text = "two_payments", "a request has one payment: got {got} payment headers, need 1"


class OfferMismatch(Unpaid):
    code, text = "offer_mismatch", "payment is for another offer: {field} is {got}, want {want}; pay by the new offer"


class InvalidChallenge(Unpaid):
    code, text = "invalid_challenge", "this server did not make this challenge, or it was changed; pay by the new one"


class ChallengeExpired(Unpaid):
    code = "challenge_expired"
    text = "challenge expired: time is {now_unix}, it was valid until {limit_unix}; pay by the new one"


class CumulativeMismatch(Unpaid):
    code = "cumulative_mismatch"
    text = "sum does not fit the channel: got {got_sat} sat, need capacity minus change, {need_sat} sat"


class CreditTooLow(Unpaid):
    code, text = "credit_too_low", "credit too low: got {got_sat} sat, the request needs {need_sat} sat"


class TooManyDeliveries(Unavailable):
    code, text = "too_many_deliveries", "too many requests of this channel are under way: got {got}, limit {limit}"
    public_text = "too many requests of this channel are under way, send the request again later"


class RequestUnderWay(Conflict):
    code, text = "request_under_way", "the same paid request is being answered; send it again later"


class UpstreamFailed(Failed):
    code, http_status = "upstream_failed", 502
    text = "the service behind this gateway gave no answer, nothing was charged; send the request again"


class UnknownDelivery(NotFound):
    code, text = "unknown_delivery", "the channel has no charge for request {request}"


class AlreadyDelivered(Conflict):
    code, text = "already_delivered", "this request is paid, and was answered {got} times, limit {limit}"


class MerchantTokenWrong(BadRequest):
    code, http_status = "merchant_token_wrong", 401
    text = "this request needs the token in the file merchant.token of the server's state directory"
