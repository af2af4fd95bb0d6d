"""Texts of the signer's protocol page that do not follow from the code: meanings of fields, and rules."""

from __future__ import annotations

MEANINGS = {
    "request id": "any, but not 0; the reply has the same",
    "reply id": "the id of the request; 0 in a refusal that belongs to no request",
    # requests
    "KeyRequest.client_key": "the client's key C",
    "KeyRequest.expiry": "the channel's expiry E: from this time on the client can take a refund",
    "KeyRequest.settling": "whether the key is needed for a settlement",
    "OtherKeysRequest.client_key": "as in KeyRequest",
    "OtherKeysRequest.expiry": "as in KeyRequest",
    "OtherKeysRequest.settling": "as in KeyRequest",
    "SettlementRequest.claims": "one per channel; only the first may leave change to its client",
    "SettlementRequest.destination_script": "scriptPubKey of the server's output",
    "SettlementRequest.fee_sat": "sum of the inputs minus sum of the outputs",
    "SettlementRequest.reserve": "coins of the signer's reserve that help to pay the fee; nil: none",
    "ChildRequest.parent": "the whole request that was signed before; its id is ignored",
    "ChildRequest.fee_sat": "fee of the child transaction alone",
    "FundingRequest.transaction": "serialized without witness, so that its double SHA-256 is the txid",
    "FundingRequest.outputs": "indices of the outputs to remember",
    "AgainRequest.outpoint": "funding outpoint of any claim in that settlement",
    "NewestRequest.claims": "the newest payment of each channel",
    "BehindRequest.payments": "up to 200",
    "ShownRequest.expires_after": "a time in Unix seconds; earlier expiries are left out",
    "ShownRequest.after": "the value of the reply before; nil: begin",
    "Newest.outpoint": "the channel",
    "Newest.change_sat": "change of the newest payment that the server has",
    "CertificateRequest.receipt_key": "a key that the server has drawn, other than the identity key",
    "CertificateRequest.not_before": "within an hour of the signer's time",
    "CertificateRequest.not_after": "later, by at most 8,640,000 seconds",
    # replies
    "HealthReply.network": '"live", "test" or "regtest"',
    "HealthReply.key_mode": "the method of key derivation, as named in the configuration",
    "HealthReply.debug": "whether the key is publicly known; never true on the live network",
    "HealthReply.problem": "description of a problem, as a sentence; empty: none",
    "HealthReply.written_at": "time of the last write of ledger and audit log to disk; a healthy signer wrote some seconds ago",
    "HealthReply.max_fee_percent": "policy.max_fee_percent",
    "HealthReply.max_fee_sat": "policy.max_fee_sat; 0: not reported",
    "HealthReply.max_fee_sat_per_vb": "policy.max_fee_sat_per_vb; 0: not reported",
    "HealthReply.identity_key": "the server's identity key, 33 bytes, which certifies keys for receipts and does nothing else; empty: none",
    "KeyReply.server_key": "the server's key S of this channel; the same request always gets the same key",
    "KeyReply.destination_script": "the scriptPubKey that this channel's settlement may pay to",
    "SettlementReply.settlement": "the signed settlement",
    "ChildReply.child": "the signed child transaction",
    "ReserveReply.public_key": "key of the reserve; its coins are P2PKH outputs to this key",
    "AgainReply.claim": "claim with the newest payment that the signer has signed for or has been shown",
    "AgainReply.request": "the request that was signed, with id 0; nil: the payment was only shown",
    "AgainReply.settlement": "the settlement of that request, signed; nil likewise",
    "BehindReply.outpoints": "outpoints of channels that the signer has signed for, or for which it was shown a payment with less change",
    "ShownReply.outpoints": "channels whose newest payment was shown",
    "ShownReply.after": "outpoint from which the next page goes on; nil: there is no next page",
    "StatusReply.started_at": "start time of the process",
    "StatusReply.decisions": "number of lines in the audit log",
    "StatusReply.head": "hash of the log's last line, 64 hex digits",
    "StatusReply.signed_last_hour_sat": "sum settled within the last hour, rounded up to ten minutes",
    "StatusReply.signed_last_day_sat": "sum settled within the last day, rounded up to ten minutes",
    "StatusReply.heartbeat_at": "time of the operator's last heartbeat; 0: none",
    "StatusReply.trial": "tags of policies on trial, which log a request but do not refuse it",
    "StatusReply.protections": 'protections of the keys, as sentences; a sentence that begins with "no " names one that is not available',
    "StatusReply.problem": "description of a problem, as a sentence; empty: none",
    "StatusReply.written_at": "time of the last write of ledger and audit log to disk",
    "StatusReply.free_bytes": "free space on the file system of ledger and audit log",
    "CertificateReply.identity_key": "as in HealthReply; the channels of the signer never have this key",
    "CertificateReply.signature": "of the identity key over the digest of a certificate, see below: strict DER with low S",
    "OtherKeysReply.server_keys": "the channel's keys of all generations but the newest; none if there is no such key",
    "NewestReply.unshown": "indices of claims whose funding transaction was not shown",
    "NewestReply.refused": "indices of claims that failed verification, or that pay less than a payment in the ledger",
    "Refusal.tag": "stable; see the table of tags",
    "Refusal.reason": "text for people; it may change",
    "Refusal.need_sat": "minimum fee that the signer would sign, if the fee is too low to replace an earlier settlement; else 0",
    # structures
    "ChannelTerms.tag": "the channel's kind: `p2sh`, the one of RBPCP; other texts are refused as no message",
    "ChannelTerms.server_key": "S",
    "ChannelTerms.client_key": "C, not the same as S",
    "ChannelTerms.expiry": "E",
    "Expiry.lock_time": "Unix time, or a block height if it is below 500,000,000, which no kind allows yet (BIP65)",
    "OutPoint.txid": "32 bytes in internal order: reversed against what wallets show",
    "OutPoint.vout": "index of the output, 0 to 4294967295",
    "Claim.terms": "terms of the channel; the redeem script follows from them",
    "Claim.outpoint": "the funding output, or the output that the channel has moved to",
    "Claim.funding_sat": "value of that output",
    "Claim.change_script": "scriptPubKey of the client's change, P2PKH, P2SH, P2WPKH, P2WSH or P2TR; the client's signature covers it",
    "Claim.payment": "the newest payment that the client signed",
    "Payment.change_sat": "amount that still belongs to the client; the rest belongs to the server",
    "Payment.signature": "the client's signature: strict DER with low S, without hash flag",
    "Payment.flag": "131 (SINGLE and ANYONECANPAY) while there is change, 130 (NONE and ANYONECANPAY) without",
    "Coin.outpoint": "an output that pays to the reserve's key",
    "Coin.value_sat": "value of that output",
    "Reserve.public_key": "the key in the reply to `ReserveRequest`",
    "Reserve.coins": "coins of the reserve to spend",
    "Settlement.transaction": "signed and serialized; no witness",
    "Settlement.txid": "32 bytes in internal order",
    "Settlement.fee_sat": "fee of the transaction",
}

PROTOCOL_TAGS = {
    "protocol-message": "the frame is no message of this version; the signer closes the connection",
    "protocol-busy": "all connections are in use and busy; the signer closes this one",
    "protocol-funding": "the signer has not been shown the funding transaction, or that of a coin: send `FundingRequest`, then the request again",
    "protocol-disk": "free disk space is reserved for settlements; send the request again later",
    "protocol-ledger": "the ledger failed: the signer signs nothing until it is restarted",
    "protocol-keys": "the key store failed; the same request may be sent again",
    "protocol-internal": "a bug in the signer",
}

PASSING = "`policy-deadline`, `protocol-busy`, `protocol-disk`, `protocol-keys` and `protocol-ledger` do not judge the request: it may be sent again."

INTRODUCTION = """\
How a payment channel server asks the process that holds its keys for signatures. A program that answers as this page
describes can replace `paychan-signer`; a program that asks as it describes can use one. This page is made from the message
table in `paychan/protocol/wire/signer_messages.py` by `python -m tests.lib.signerpage`, and a test compares the two.

The signer listens on a Unix stream socket. It asks the kernel for the peer's user (SO_PEERCRED) and answers the users on
its list; there is no other authentication, no encryption and no handshake. A request describes the transaction to sign, it
never carries a hash or a finished transaction: the signer builds every transaction itself."""

FRAMES = """\
Both sides send frames:

| bytes | content |
|---|---|
| 4 | length of the rest, big endian: {least} to {most} |
| 1 | version of this protocol: {version} |
| rest | one [msgpack](https://msgpack.org) array: `[number, id, …fields in their order]` |

A length outside these bounds, another version, an unknown number, a missing or superfluous field or one of the wrong type
is answered with a `Refusal` of id 0 and tag `protocol-message`, and the signer closes the connection. Fields with a default
may be left out from the end. Extra bytes after the array are an error, like missing ones."""

VALUES = """\
| here | msgpack | |
|---|---|---|
| int | any int format | -2^63 to 2^64 - 1; a float is refused |
| bytes | bin 8, 16, 32 | a str is refused |
| text | str, UTF-8 | |
| bool | true, false | 0 and 1 are refused |
| array of … | array | of any length up to the frame's |
| a structure | array | its fields in their order; more than these are ignored |
| nil | nil | |

Satoshi and Unix seconds are ints. Keys are secp256k1 points, compressed, 33 bytes."""

SIGNED = """\
A settlement is a transaction of version 1 with lock time 0. Its inputs are the claims' outpoints in the order of the
request, then the reserve's coins, all with sequence ffffffff. Its first output is the first claim's change, `change_sat` to
`change_script`, if that claim's flag is 131; then comes the server's output with the rest:

    sum of (funding_sat - change_sat) of all claims + sum of value_sat of all coins - fee_sat

to `destination_script`; it is left out if that is 0. Every signature in a transaction is ECDSA over the legacy hash
with SIGHASH_ALL (RFC 6979, low S, DER, then the byte 01). A claim's scriptSig is

    <client's signature and flag> <server's signature> OP_1 <redeem script>

with the redeem script, whose number is a script number in its shortest form, pushed by OP_PUSHDATA1:

    IF <S> CHECKSIGVERIFY ELSE <E> CHECKLOCKTIMEVERIFY DROP ENDIF <C> CHECKSIG

A coin's scriptSig is `<signature> <key>`. A child spends the server's output of its parent, whole, to the same script, for
`fee_sat`: version 1, lock time 0, sequence ffffffff."""

CERTIFICATES = """\
A certificate says that a key signs receipts of the server from one time to another. The identity key, which signs nothing
else, signs its digest by ECDSA (RFC 6979, low S, DER):

    t = SHA256("paychan/receipt-key")
    digest = SHA256(t ‖ t ‖ receipt_key ‖ not_before ‖ not_after)

The times have 8 bytes each, big endian. The identity key is neither the key of a channel nor that of the reserve."""

RULES = """\
- **Order.** Replies come in any order; ids pair them, and the client chooses ids (not 0). The signer handles requests of
  one connection concurrently. If a request must follow another (`SettlementRequest` after `FundingRequest`), send it after
  the reply to the first.
- **Again.** Every request may be sent again. The same settlement has the same bytes as before, also if its first reply was
  lost: the ledger stores it before it is signed. Another settlement of the same outpoint must pay a higher rate.
- **Deadlines.** A frame must arrive within {request_seconds} s of its first four bytes, and is answered within {request_seconds} s; else
  the signer refuses with `policy-deadline`. A connection without requests is closed after {idle_seconds} s. These are the defaults of
  `socket.request_seconds` and `socket.idle_seconds`.
- **Limits.** {connections} connections (`socket.max_connections`). The signer handles {in_flight} requests of one connection at a time, or
  {bytes_in_flight} bytes of them; further requests wait in the socket. When all connections are in use, a new one closes the one
  that has been idle longest. A settlement has at most {claims} claims
  and {coins} coins of the reserve.
- **Refused connections.** The signer sends one `Refusal` of id 0 to a peer that it refuses, then ends the stream."""
