"""The part of a payer's channel that needs neither network nor waiting: properties, the refund, the private key."""

from __future__ import annotations

from msgspec import Struct, structs

from paychan.client.amounts import whole
from paychan.client.errors import TermsUnacceptable
from paychan.client.flows import refund as recovery
from paychan.client.flows.refund import RefundTerms
from paychan.client.limits import Limits
from paychan.client.record import ChannelRecord
from paychan.client.transport.effects import TIME_LIMIT_SECONDS, Patience
from paychan.client.wallet import ChannelFile
from paychan.protocol.debug_funding import DEBUG_FUNDING_SAT, debug_outpoint
from paychan.protocol.kinds.refund import Refund
from paychan.protocol.types import Network, OutPoint, Sat


class TransportSettings(Struct, frozen=True):
    """Limits, retry policy and time limit that a payer applies to every server."""

    limits: Limits = Limits()
    patience: Patience = Patience()
    time_limit_seconds: float = TIME_LIMIT_SECONDS


class ChannelBase:
    """Properties and methods that neither use the network nor block."""

    def __init__(self, file: ChannelFile, record: ChannelRecord, settings: TransportSettings) -> None:
        self._file, self._settings = file, settings
        self.record = record
        """Newest record that is durable in the wallet."""

    @property
    def name(self) -> str:
        return self.record.name

    @property
    def address(self) -> str:
        """Funding address: pay `amount_sat` to it, in one output."""
        return self.record.funding_address

    @property
    def min_funding_sat(self) -> Sat:
        return self.record.min_funding_sat

    @property
    def amount_sat(self) -> Sat:
        """Amount to send to `address`: the amount that the payer planned, or the minimum that opens the channel."""
        return self.record.amount_sat

    @property
    def left_sat(self) -> Sat:
        """Amount that certainly still belongs to the payer."""
        return self.record.left_sat

    @property
    def paid_sat(self) -> Sat:
        """Sum of all signed payments, acknowledged or not."""
        return self.record.paid_sat

    def bip21(self, amount_sat: int | None = None) -> str:
        """Return the BIP21 payment URI for `amount_sat` (satoshi; default `self.amount_sat`).

        The URI gives whole bitcoins.
        """
        amount = self.amount_sat if amount_sat is None else amount_sat
        coins, rest = divmod(whole(amount, "amount_sat"), 100_000_000)
        return f"bitcoin:{self.address}?amount={coins}.{rest:08d}"

    def refund(
        self,
        sat_per_vb: int = recovery.REFUND_SAT_PER_VB,
        address: str = "",
        *,
        max_fee_sat: int | None = None,
        unchecked: bool = False,
    ) -> Refund:
        """Sign the transaction that returns all coins to the payer after the expiry. It is neither sent nor saved.

        Args:
            sat_per_vb: fee rate.
            address: receives the coins; default the channel's home address.
            max_fee_sat: highest fee to accept. Without it, a fee above 10 % or above 200 sat/vB is declined.
            unchecked: sign although a value was typed or is only the server's claim. If such an output holds more, the
                difference is lost as fee.

        Raises:
            WrongState, ValueUnchecked, FeeTooHigh, FundingTooSmall, Malformed: see `flows.refund.refund`.
        """
        terms = RefundTerms(sat_per_vb, address, max_fee_sat=max_fee_sat, unchecked=unchecked)
        return recovery.refund(self.record, terms)

    def wif(self) -> str:
        """Return the channel's private key in wallet import format (WIF), to sweep change from the default address."""
        return recovery.wif(self.record)

    def release(self) -> None:
        """Unlock the file for other processes. Do not use this object afterwards."""
        self._file.release()

    @property
    def released(self) -> bool:
        """Whether the file is unlocked, so that this object is of no use any more."""
        return not self._file.release.alive

    def begins_funding(self, amount_sat: int) -> bool:
        """Record that coins of `amount_sat` are about to be sent; False if it was recorded before, or coins are known."""
        if self.record.funding_asked or self.record.held:
            return False
        self._keep(structs.replace(self.record, funding_asked=True, meant_sat=Sat(amount_sat)))
        return True

    def _keep(self, record: ChannelRecord) -> None:
        self._file.save(record)
        self.record = record

    def _debug_funding(self) -> tuple[OutPoint, Sat]:
        if self.record.network is Network.LIVE:
            raise TermsUnacceptable(what="network of debug funding", got="live", want="test")
        outpoint = debug_outpoint(self.record.terms.client_key, self.record.expiry)
        return outpoint, DEBUG_FUNDING_SAT
