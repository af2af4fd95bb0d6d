"""A channel kind: everything that depends on the script of the funding output.

`ChannelTerms` names its kind; all other modules ask the kind and know no script. A new kind is one file with a subclass
of `ChannelKind`, and its `register` in `kinds/__init__.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import msgspec
from msgspec import Struct

from paychan.protocol.address import encode_address
from paychan.protocol.errors import KeyReuse
from paychan.protocol.expiry import Expiry, check_expiry
from paychan.protocol.keys import KeyBytes
from paychan.protocol.tx import Unlocking, UnsignedTransaction, double_sha256, input_weight
from paychan.protocol.types import Network, OutPoint, Sat

SIGHASH_ALL = 0x01
"""The only flag of signatures that the server makes, and of those in refunds."""

MAX_SIGNATURE_BYTES = 72
"""A low-S DER signature of secp256k1 has at most 71 bytes, and one byte of hash flag."""

LARGEST_SIGNATURE = bytes(MAX_SIGNATURE_BYTES - 1)
"""Stands for a signature (without flag) where a size is computed."""


RBPCP_KIND = "p2sh"
"""Tag of the only kind that RBPCP has, and of all channels whose record names no kind."""


class ChannelTerms(Struct, frozen=True, array_like=True):
    """Kind, server key S, client key C (33-byte compressed points) and expiry E of one channel."""

    tag: str
    """Names the kind; unknown tags are refused."""
    server_key: KeyBytes
    client_key: KeyBytes
    expiry: Expiry

    def __post_init__(self) -> None:
        """Refuse an unknown kind.

        Raises:
            ValueError: no kind with this tag is registered.
        """
        if self.tag not in _KINDS:
            msg = f"unknown channel kind {self.tag[:20]!r}"
            raise ValueError(msg)

    @property
    def kind(self) -> ChannelKind:
        """The channel's kind."""
        return _KINDS[self.tag]

    @property
    def redeem_script(self) -> bytes:
        """The script that the funding output commits to, with all terms in it."""
        return self.kind.redeem_script(self)

    @property
    def funding_script(self) -> bytes:
        """ScriptPubKey of the funding output."""
        return self.kind.funding_script(self)

    def funding_address(self, network: Network) -> str:
        """Address that the client's wallet pays to."""
        return self.kind.funding_address(self, network)


def make_terms(server_key: bytes, client_key: bytes, expiry: int, tag: str = RBPCP_KIND) -> ChannelTerms:
    """Combine checked parts into terms; the expiry is a Unix time.

    Raises:
        ValueError: no kind has this tag.
        ExpiryNotATime: see `check_expiry`.
        KeyReuse: both keys are the same, so one party could spend alone.
    """
    if server_key == client_key:
        raise KeyReuse(server_key=server_key.hex())
    return ChannelTerms(tag, server_key, client_key, Expiry(check_expiry(expiry)))


class _UntaggedTerms(Struct, frozen=True, array_like=True):
    """Terms as records and messages held them before they named a kind."""

    server_key: KeyBytes
    client_key: KeyBytes
    expiry: int


def tagged(untagged: Any) -> ChannelTerms:
    """Read decoded terms of before tags. Raises `msgspec.ValidationError`."""
    terms = msgspec.convert(untagged, _UntaggedTerms)
    return ChannelTerms(RBPCP_KIND, terms.server_key, terms.client_key, Expiry(terms.expiry))


class SignedPayment(Protocol):
    """A payment as a kind sees it."""

    @property
    def signature_with_flag(self) -> bytes: ...

    @property
    def has_change(self) -> bool: ...


class Claimed(Protocol):
    """A channel's part of a settlement as a kind sees it."""

    @property
    def terms(self) -> ChannelTerms: ...

    @property
    def payment(self) -> SignedPayment: ...


class PaymentPreimage(NamedTuple):
    """The bytes that the client signs for a payment, without the change value; they are laid out once for a channel.

    `sha256d(head + output + tail)` is the digest of a payment with change. `output` is the change value (8 bytes, little
    endian) and `script`, or its `sha256d` if `hashes_output` (BIP143). `sha256d(drained)` is that of one without.
    """

    head: bytes
    script: bytes
    """The change script after its length."""
    tail: bytes
    drained: bytes
    hashes_output: bool = False

    def digest(self, change_sat: Sat) -> bytes:
        """Return the 32 bytes that the client signs for a change value in satoshi.

        SINGLE without its output must never be hashed: the hash is then the constant 1, and a signature over 1 is valid
        for any transaction.
        """
        if not change_sat:
            return double_sha256(self.drained)
        output = change_sat.to_bytes(8, "little") + self.script
        return double_sha256(self.head + (double_sha256(output) if self.hashes_output else output) + self.tail)


class Spend(NamedTuple):
    """The parts of an input that spends a funding output; signatures end with their hash flag, or are empty."""

    by_server: bool
    """Whether it uses the branch that needs the server's signature; the other branch is the client's refund."""
    script: bytes
    client_signature: bytes = b""
    server_signature: bytes = b""


class ChannelKind(ABC):
    """One kind of funding output: its script, its digests, and the inputs that spend it. It has no state."""

    tag: ClassVar[str]
    """Name of the kind."""
    change_flag: ClassVar[int]
    """Hash flag of a payment that leaves change."""
    drained_flag: ClassVar[int]
    """Hash flag of a payment that leaves nothing."""
    signs_value: ClassVar[bool]
    """Whether digests commit to the value of the funding output (BIP143)."""
    has_witness: ClassVar[bool]

    @abstractmethod
    def redeem_script(self, terms: ChannelTerms) -> bytes:
        """Return the script that the funding output commits to."""

    @abstractmethod
    def funding_script(self, terms: ChannelTerms) -> bytes:
        """Return the scriptPubKey of the funding output."""

    @abstractmethod
    def is_funding_script(self, script: bytes) -> bool:
        """Say whether this can be the scriptPubKey of a funding output of this kind, by its form."""

    def funding_address(self, terms: ChannelTerms, network: Network) -> str:
        """Return the address of the funding output."""
        return encode_address(self.funding_script(terms), network)

    @abstractmethod
    def payment_preimage(
        self, terms: ChannelTerms, outpoint: OutPoint, funding_sat: Sat, change_script: bytes
    ) -> PaymentPreimage:
        """Return what the client signs for a channel's payments."""

    def payment_digest(
        self, terms: ChannelTerms, outpoint: OutPoint, funding_sat: Sat, change_script: bytes, change_sat: Sat
    ) -> bytes:
        """Return the digest of one payment (32 bytes)."""
        return self.payment_preimage(terms, outpoint, funding_sat, change_script).digest(change_sat)

    def flag(self, change_sat: Sat) -> int:
        """Return the hash flag of the payment that leaves this change."""
        return self.change_flag if change_sat else self.drained_flag

    @abstractmethod
    def may_join(self, claims: Sequence[Claimed]) -> bool:
        """Say whether this kind's claims are valid at their places: claim i is input i, and its change is output i."""

    @abstractmethod
    def input(self, claim: Claimed, server_signature: bytes) -> Unlocking:
        """Return script and witness of a settlement's input; the server's signature is strict DER without flag."""

    def input_weight(self, claim: Claimed) -> int:
        """Return the largest weight of that input (BIP141), with its outpoint and sequence."""
        return input_weight(self.input(claim, LARGEST_SIGNATURE))

    @abstractmethod
    def settlement_digest(
        self, transaction: UnsignedTransaction, index: int, terms: ChannelTerms, funding_sat: Sat
    ) -> bytes:
        """Return the SIGHASH_ALL digest of an input that spends the funding output, in a settlement or a refund."""

    @abstractmethod
    def recognise(self, unlocking: Unlocking) -> Spend | None:
        """Read an input of this kind; None: it is none. Only the chain, or the caller, can check its signatures."""

    @abstractmethod
    def refund(self, terms: ChannelTerms, client_signature: bytes) -> Unlocking:
        """Return script and witness of a refund's input; the client's signature is strict DER without flag."""


_KINDS: dict[str, ChannelKind] = {}


def register(kind: ChannelKind) -> None:
    """Make a kind known by its tag."""
    _KINDS[kind.tag] = kind


def is_funding_script(script: bytes) -> bool:
    """Say whether a scriptPubKey can fund a channel of any known kind, by its form."""
    return any(kind.is_funding_script(script) for kind in _KINDS.values())


def recognise(unlocking: Unlocking) -> Spend | None:
    """Read an input that spends a funding output of any kind; None: it is of no known kind."""
    return next((spend for kind in _KINDS.values() if (spend := kind.recognise(unlocking)) is not None), None)
