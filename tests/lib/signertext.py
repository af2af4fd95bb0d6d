"""What the signer's protocol page says beyond the code: meanings of fields, and rules that no type tells."""

from __future__ import annotations

MEANINGS = {
    "request id": "any, but not 0; the reply has the same",
    "reply id": "the request's; 0 in a refusal that belongs to no request",
    # requests
    "KeyRequest.client_key": "the client's key C",
    "KeyRequest.expiry": "the channel's expiry E: from then on the client can take everything back",
    "KeyRequest.settling": "the key is needed to settle",
    "OtherKeysRequest.client_key": "as in KeyRequest",
    "OtherKeysRequest.expiry": "as in KeyRequest",
    "OtherKeysRequest.settling": "as in KeyRequest",
    "SettlementRequest.claims": "one per channel; only the first may leave change to its client",
    "SettlementRequest.destination_script": "scriptPubKey of the server's output",
    "SettlementRequest.fee_sat": "what the server's output is short of what the claims and coins give it",
    "SettlementRequest.reserve": "coins of the signer's own that help to pay; nil: none",
    "ChildRequest.parent": "the whole request that was signed before; its id is not looked at",
    "ChildRequest.fee_sat": "of the child alone",
    "FundingRequest.transaction": "serialized without witness, so that its double SHA-256 is the txid",
    "FundingRequest.outputs": "indices of the outputs to remember",
    "AgainRequest.outpoint": "of any claim of that settlement",
    "NewestRequest.claims": "the newest payment of each channel",
    "BehindRequest.payments": "up to 200",
    "Newest.outpoint": "the channel",
    "Newest.change_sat": "of its newest payment, as the server has it",
    # replies
    "HealthReply.network": '"live", "test" or "regtest"',
    "HealthReply.key_mode": "how keys are derived, as the configuration names it",
    "HealthReply.debug": "the key is publicly known; never true on the live network",
    "HealthReply.problem": "what is wrong, as a sentence; empty: nothing",
    "HealthReply.written_at": "when ledger and audit log were last on disk; at most some seconds ago in a signer that is well",
    "HealthReply.max_fee_percent": "policy.max_fee_percent",
    "HealthReply.max_fee_sat": "policy.max_fee_sat; 0: not told",
    "HealthReply.max_fee_sat_per_vb": "policy.max_fee_sat_per_vb; 0: not told",
    "KeyReply.server_key": "the server's key S of this channel; the same question has the same answer for ever",
    "KeyReply.destination_script": "scriptPubKey that this channel's settlement may pay to",
    "SettlementReply.settlement": "what was asked for, signed",
    "ChildReply.child": "what was asked for, signed",
    "ReserveReply.public_key": "its coins are those of P2PKH outputs to this key",
    "AgainReply.claim": "of the newest payment that was signed for or shown",
    "AgainReply.request": "what was signed; its id is 0; nil: the payment was only shown",
    "AgainReply.settlement": "what that request means, signed; nil likewise",
    "BehindReply.outpoints": "those that were signed for, or of which a payment with less change was shown",
    "StatusReply.started_at": "when the process began",
    "StatusReply.decisions": "lines of the audit log",
    "StatusReply.head": "hash of the log's last line, 64 hex digits",
    "StatusReply.signed_last_hour_sat": "settled within the last hour, rounded up to ten minutes",
    "StatusReply.signed_last_day_sat": "settled within the last day, rounded up to ten minutes",
    "StatusReply.heartbeat_at": "the operator's last sign of life; 0: none",
    "StatusReply.trial": "tags of policies that only log what they would refuse",
    "StatusReply.protections": 'what keeps the keys in, as sentences; those begun with "no " could not be had',
    "StatusReply.problem": "what is wrong, as a sentence; empty: nothing",
    "StatusReply.written_at": "when ledger and audit log were last on disk",
    "StatusReply.free_bytes": "what the file system of ledger and audit log has left",
    "OtherKeysReply.server_keys": "without the newest generation's; where a channel has no such key: none",
    "NewestReply.unshown": "indices of claims whose funding transaction was not shown",
    "NewestReply.refused": "indices of claims that are not believed, or are of less than is remembered",
    "Refusal.tag": "stable; see the table of tags",
    "Refusal.reason": "for people, may change",
    "Refusal.need_sat": "the least fee that would be signed, where the fee is too low to replace another; else 0",
    # structures
    "ChannelTerms.server_key": "S",
    "ChannelTerms.client_key": "C, not the same as S",
    "ChannelTerms.expiry": "E",
    "OutPoint.txid": "32 bytes in internal order: reversed against what wallets show",
    "OutPoint.vout": "index of the output, 0 to 4294967295",
    "Claim.terms": "make the redeem script",
    "Claim.outpoint": "the funding output, or the one the channel went to since",
    "Claim.funding_sat": "what that output holds",
    "Claim.change_script": "scriptPubKey where the client wants its change, P2PKH or P2SH; part of what it signed",
    "Claim.payment": "the newest that the client signed",
    "Payment.change_sat": "what still belongs to the client; the rest is the server's",
    "Payment.signature": "the client's, strict DER with low S, without hash flag",
    "Payment.flag": "131 (SINGLE and ANYONECANPAY) while there is change, 130 (NONE and ANYONECANPAY) without",
    "Coin.outpoint": "an output that pays to the reserve's key",
    "Coin.value_sat": "what it holds",
    "Reserve.public_key": "the key that `ReserveRequest` was answered with",
    "Reserve.coins": "what is spent of them",
    "Settlement.transaction": "signed and serialized; no witness",
    "Settlement.txid": "32 bytes in internal order",
    "Settlement.fee_sat": "as asked for",
}

PROTOCOL_TAGS = {
    "protocol-message": "what came is no message of this version; the connection ends",
    "protocol-busy": "all connections are taken and at work; this one ends",
    "protocol-funding": "the funding transaction, or a coin's, was not shown: send `FundingRequest`, then ask again",
    "protocol-disk": "the disk has too little room for what is not needed to settle; ask again later",
    "protocol-ledger": "what is signed can't be remembered, so nothing is signed until the signer is started again",
    "protocol-keys": "the key store failed; the same request may be sent again",
    "protocol-internal": "a mistake of the signer's own",
}

PASSING = "`policy-deadline`, `protocol-busy`, `protocol-disk`, `protocol-keys` and `protocol-ledger` say nothing about the request: it may be sent again."

INTRODUCTION = """\
How a payment channel server asks the process that holds its keys. Whoever answers as this page says can take the place
of `paychan-signer`; whoever asks as it says can use one. This page is made from the message table in
`paychan/protocol/wire/signer_messages.py` by `python -m tests.lib.signerpage`, and a test compares the two.

The signer listens on a Unix stream socket. It asks the kernel for the peer's user (SO_PEERCRED) and answers those on its
list; there is no other authentication, no encryption and no handshake. Every request carries the meaning of what is to be
signed, never a hash or a finished transaction: the signer builds what it signs."""

FRAMES = """\
Both sides send frames:

| bytes | content |
|---|---|
| 4 | length of the rest, big endian: {least} to {most} |
| 1 | version of this protocol: {version} |
| rest | one [msgpack](https://msgpack.org) array: `[number, id, …fields in their order]` |

A length outside these bounds, another version, an unknown number, a missing or superfluous field or one of the wrong type
is answered with a `Refusal` of id 0 and tag `protocol-message`, and the connection ends. Fields with a default may be
left out from the end. Bytes after the array are as wrong as too few."""

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
`change_script`, if that claim's flag is 131; then comes the server's output with what is left:

    sum of (funding_sat - change_sat) of all claims + sum of value_sat of all coins - fee_sat

to `destination_script`; it is left out where that is 0. Every signature of the signer's is ECDSA over the legacy hash with
SIGHASH_ALL (RFC 6979, low S, DER, then the byte 01). A claim's scriptSig is

    <client's signature and flag> <server's signature> OP_1 <redeem script>

with the redeem script, whose number is a script number in its shortest form, pushed by OP_PUSHDATA1:

    IF <S> CHECKSIGVERIFY ELSE <E> CHECKLOCKTIMEVERIFY DROP ENDIF <C> CHECKSIG

A coin's scriptSig is `<signature> <key>`. A child spends the server's output of its parent, whole, to the same script, for
`fee_sat`: version 1, lock time 0, sequence ffffffff."""

RULES = """\
- **Order.** Replies come in any order; ids pair them, and the asker chooses ids (not 0). Requests of one connection are
  worked on side by side. A request that must follow another (`FundingRequest` before `SettlementRequest`) is sent after
  the other's reply.
- **Again.** Every request may be sent again. The same settlement has the same bytes as before, also when its first reply
  was lost: it was remembered before it was signed. Another settlement of the same outpoint has to pay a higher rate.
- **Deadlines.** A frame has to arrive within {request_seconds} s of its first four bytes, and is answered within {request_seconds} s; else
  `policy-deadline`. A connection without requests is closed after {idle_seconds} s. These are the defaults of
  `socket.request_seconds` and `socket.idle_seconds`.
- **Limits.** {connections} connections (`socket.max_connections`); of one connection {in_flight} requests are worked on at a time, further
  ones wait in the socket. Of frames above {usual} bytes {large} are read at a time. A settlement has up to {claims} claims
  and {coins} coins of the reserve.
- **Turned away.** A peer that is turned away gets one `Refusal` of id 0, then the end of the stream."""
