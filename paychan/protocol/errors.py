"""Every refusal the project knows: one tree, one table.

    PaychanError
    ├── Moved                 308   the same request, adapted, at another resource
    ├── BadRequest            400   the request, the payment or the funding is not acceptable
    ├── Unpaid                402   the resource has a price; leaves are in `unpaid.py`
    ├── NotFound              404   no such channel, or not for this caller
    ├── Conflict              409   another request used the outpoint first
    ├── Gone                  410   the channel accepts no more payments
    ├── Failed                500   the server could not finish an accepted task
    └── Unavailable           503   try again later; nothing was changed

Each leaf has a stable `code`, an HTTP status and typed fields; the text holds both numbers. Clients read the code,
never the text. A refusal is a value where a decision is made (`channel.Rejected`), and is raised only by parsers.
"""

from __future__ import annotations

from typing import Any, ClassVar


class PaychanError(Exception):
    """A refusal with a stable code. Subclasses declare `code`, `text` and get their fields by keyword."""

    code: ClassVar[str] = ""
    text: ClassVar[str] = ""
    public_text: ClassVar[str] = ""
    """Sentence for unauthenticated callers, if the text reveals the server's internals; the log has the text."""
    http_status: ClassVar[int] = 500
    table: ClassVar[dict[str, type[PaychanError]]] = {}

    def __init_subclass__(cls) -> None:
        """Enter a leaf into the table of codes, which a test compares with the documentation."""
        if cls.code:
            if cls.code in PaychanError.table:
                msg = f"error code {cls.code!r} is used twice"
                raise TypeError(msg)
            PaychanError.table[cls.code] = cls

    def __init__(self, **fields: Any) -> None:
        super().__init__(self.text.format(**fields))
        self.fields = fields

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.fields == getattr(other, "fields", None)

    __hash__ = Exception.__hash__


class Moved(PaychanError):
    http_status = 308


class BadRequest(PaychanError):
    http_status = 400


class Unpaid(PaychanError):
    http_status = 402


class NotFound(PaychanError):
    http_status = 404


class Conflict(PaychanError):
    http_status = 409


class Gone(PaychanError):
    http_status = 410


class Failed(PaychanError):
    http_status = 500


class Unavailable(PaychanError):
    http_status = 503


# --- 400: the request -----------------------------------------------------------------------------------------------


class Malformed(BadRequest):
    code, text = "malformed", "{field}: {reason}"


class Missing(BadRequest):
    code, text = "missing", "{field}: missing"


class Repeated(BadRequest):
    code, text = "repeated", "{field}: given more than once"


class BodyTooLarge(BadRequest):
    code, text, http_status = "body_too_large", "body too large: got {got_bytes} bytes, limit {limit_bytes} bytes", 413


class RequestLineTooLong(BadRequest):
    code, text, http_status = "request_line_too_long", "request line too long: limit {limit_bytes} bytes", 414


class HeadTooLarge(BadRequest):
    code, http_status = "head_too_large", 431
    text = "request head too large: limit {limit_bytes} bytes and {limit_lines} header lines"


class TooManyPayments(BadRequest):
    code, text, http_status = "too_many_payments", "too many payments in a frame: got {got}, limit {limit}", 413


class TooManyRequests(BadRequest):
    code, http_status = "too_many_requests", 429
    text = "too many requests about new channels from one address: limit {limit} per second, wait {wait_seconds} s"


class TooManyBadSignatures(BadRequest):
    code, http_status = "too_many_bad_signatures", 429
    text = "too many bad signatures: got {count} on this connection, limit {limit}; the server closes it"


class MethodNotAllowed(BadRequest):
    code, text, http_status = "method_not_allowed", "method {method} not allowed here", 405


class Unauthorized(BadRequest):
    code, http_status = "unauthorized", 401
    text = "this request needs the token in the file management.token of the state directory"


class Misdirected(BadRequest):
    code, text, http_status = "misdirected", "this listener does not serve the host that the request names", 421


class CrossSite(BadRequest):
    code, text, http_status = "cross_site", "pages of other sites may not send requests here", 403


class AmbiguousPath(BadRequest):
    code, text = "path_ambiguous", "the path is refused, as two programs could read it differently: {reason}"


class OutPointMismatch(BadRequest):
    code, text = "outpoint_mismatch", "funding outpoint differs: got {got} in the body, {want} in the URL"


# --- 400: expiry, keys and funding of a new channel -----------------------------------------------------------------


class ExpiryNotATime(BadRequest):
    code, text = "expiry_not_a_time", "expiry is not a time: got {got}, need 500000000 to 4294967295"


class ExpiryTooSoon(BadRequest):
    code, text = "expiry_too_soon", "expiry too soon: got {got_unix}, need later than {need_unix}"


class ExpiryTooLate(BadRequest):
    code, text = "expiry_too_late", "expiry too late: got {got_unix}, need {need_unix} or earlier"


class KeyReuse(BadRequest):
    code, text = "key_reuse", "client key equals the server key {server_key}"


class WrongServerKey(BadRequest):
    code, text = "wrong_server_key", "server key in the script is not this server's: got {got}, need {need}"


class FundingNotFound(BadRequest):
    code, text = "funding_not_found", "no unspent output pays to {address}{detail}"


class FundingUnconfirmed(BadRequest):
    code, text = "funding_unconfirmed", "funding not confirmed deep enough: got {got} confirmations, need {need}"


class FundingTooLarge(BadRequest):
    code, text = (
        "funding_too_large",
        "funding transaction without witness: got {got_bytes} bytes, need at most {need_bytes}",
    )


class TooMuchUnconfirmed(BadRequest):
    code = "too_much_unconfirmed"
    text = "too much unconfirmed funding: {got_sat} sat with this one, limit {need_sat} sat; wait for a confirmation"
    public_text = "too much unconfirmed funding, wait for a confirmation"


# --- 400: the payment -----------------------------------------------------------------------------------------------


class BadFlag(BadRequest):
    code, text = "bad_flag", "sighash flag: got 0x{got:02x}, need 0x83 with change or 0x82 without"


class FlagMismatch(BadRequest):
    code, text = "flag_mismatch", "sighash flag 0x{flag:02x} does not fit a change value of {change_sat} sat"


class DustChange(BadRequest):
    code, text = "dust_change", "change is dust: got {got_sat} sat, need 0 or at least {need_sat} sat"


class ValueBackwards(BadRequest):
    code, text = "value_backwards", "payment takes value back: got change {got_sat} sat, need at most {need_sat} sat"


class BadSignature(BadRequest):
    code, text = "bad_signature", "signature does not verify for change {change_sat} sat and this funding output"


class SignatureEncoding(BadRequest):
    code, text = "signature_encoding", "signature is not strict DER with low S: {reason}"


class PaymentShort(BadRequest):
    code, text = "payment_short", "payment short: got {got_sat} sat, need {need_sat} sat"


class NotNewestPayment(BadRequest):
    code, text = "not_newest_payment", "not the newest payment: got change {got_sat} sat, newest has {need_sat} sat"


class FeesTooHigh(BadRequest):
    code = "fees_too_high"
    text = "fees too high to settle now: it may cost up to {got_sat} sat, the network relays from {need_sat} sat"


class NotEconomical(BadRequest):
    code, text = "not_economical", "not worth settling: received {got_sat} sat, settlement needs {need_sat} sat"


class ClosingFeeTooHigh(BadRequest):
    code = "closing_fee_too_high"
    text = "fee offered for closing is too high: got {got_sat} sat, the settlement may pay at most {need_sat} sat"


class NotWithdrawable(BadRequest):
    code, text = "not_withdrawable", "nothing can be withdrawn from this channel: {reason}"


class ApplicationRefused(BadRequest):
    code, text = "application_error", "application refused the payment: {reason}"


# --- 308, 404, 409, 410 ---------------------------------------------------------------------------------------------


class ChannelMoved(Moved):
    code, text = "channel_moved", "channel continues at {outpoint}, which holds {funding_sat} sat"


class NoSuchRoute(NotFound):
    code, text = "no_such_route", "no such resource"


class NotForSale(NotFound):
    code, text = "not_for_sale", "the price list has no price for the path {path}"


class UnknownChannel(NotFound):
    code, text = "unknown_channel", "unknown channel"


class ChannelExists(Conflict):
    code, text = "channel_exists", "channel {outpoint} exists already"


class OutpointUsed(Conflict):
    code, text = "outpoint_used", "outpoint {outpoint} was used by an earlier channel"


class ChannelExpiring(Gone):
    code, text = "channel_expiring", "channel expires: time is {now_unix}, payments ended at {limit_unix}"


class ChannelClosing(Gone):
    code, text = "channel_closing", "channel is closing, settlement in progress"


class ChannelClosed(Gone):
    code, text = "channel_closed", "channel is closed, settled by {txid}"


class ChannelLost(Gone):
    code, text = "channel_lost", "funding output was spent by {txid}"


class NeverFunded(Gone):
    code, text = "never_funded", "the funding transaction was replaced and never confirmed"


# --- 500, 503: the server -------------------------------------------------------------------------------------------


class InternalError(Failed):
    code, text = "internal_error", "internal error"


class SigningFailed(Failed):
    code, text = "signing_failed", "settlement could not be signed: {reason}"
    public_text = "the settlement could not be signed"


class PublishFailed(Failed):
    code, text = "publish_failed", "settlement could not be published: {reason}"
    public_text = "the settlement could not be published"


class BackupFailed(Failed):
    code, text = "backup_failed", "no backup was made: {reason}"
    public_text = "no backup was made"


class SignerUnavailable(Unavailable):
    code, text = "signer_unavailable", "signer is not available: {reason}"
    public_text = "the signer is not available"


class ChainUnavailable(Unavailable):
    code, text = "chain_unavailable", "no trustworthy view of the chain: {reason}"
    public_text = "no trustworthy view of the chain"


class StorageFull(Unavailable):
    code, text = "storage_full", "the server's disk is nearly full; channels can be closed"


class StoreRebuilding(Unavailable):
    code, text = "store_rebuilding", "the server rebuilds its damaged store; send the request again"
    public_text = "the server is starting, send the request again"


class DamagedRecord(Unavailable):
    """A stored record has a wrong version, checksum or structure. It is never served and never overwritten."""

    code = "damaged_record"
    text = "the stored record can't be read: {reason}; `paychan status` says what to do"
    public_text = "the server can't read its record of this channel"


class PaymentPending(Unavailable):
    code, text = "payment_pending", "the application has not answered for the payment with change {change_sat} sat yet"


class ChannelMoving(Unavailable):
    code, text = "channel_moving", "channel moves to another output, which must confirm; send the request again"


class TooManyStreams(Unavailable):
    code, text = "too_many_streams", "all {limit} streams are in use, pay by PUT"
    public_text = "all streams are in use, pay by PUT"


class StreamReplaced(Unavailable):
    code, text = (
        "stream_replaced",
        "the server closed this stream for another: got {got} streams, limit {limit}; open it again to pay",
    )


class SearchTooLong(Unavailable):
    code, text = "search_too_long", "{looked_at} channels searched without a match; ask by outpoint"


class MemoryLow(Unavailable):
    code, text = "memory_low", "memory is nearly used up: got {left_bytes} bytes left, need {need_bytes}"
    public_text = "the server's memory is nearly used up"


class TooManyConnections(Unavailable):
    code, text = "too_many_connections", "all connections are busy, send the request again"


class Overloaded(Unavailable):
    code, text = "overloaded", "the server is overloaded: {waiting} {what} are waiting, limit {limit}"
    public_text = "the server is overloaded"


class TryAgain(Unavailable):
    code, text = "try_again", "another process changed the channel meanwhile, send the request again"
