"""The versions of the messages between server and signer (`signer_messages`), with the reason of each."""

from __future__ import annotations

VERSIONS = {
    1: "health, keys and settlements",
    2: "a reserve's coins and children help a settlement to confirm; a refusal names the lowest sufficient fee",
    3: "the server shows a funding transaction before it settles the channel; the signer returns an earlier settlement "
    "again; an operator sees the signer's state; frames may be as large as a funding transaction",
    4: "health tells whether the signer can still write, and the fees that it allows; a request marks a key that is "
    "needed to settle; the server shows newest payments; the signer returns the newest signed or shown claim; the "
    "server asks which of its records are behind; the signer names keys of earlier generations",
    5: "the server asks which channels the signer was shown, and finds those that its store lacks",
    6: "the terms of a claim name the channel's kind, and its expiry is a value of its own; a frame has up to 128 KiB, as "
    "a funding transaction is no larger than nodes relay; change may also be P2WPKH, P2WSH or P2TR",
    7: "health names the server's identity key; the server has it certify a key for receipts",
}
"""The changes of each version. A peer with another version is refused: messages have no optional fields."""

VERSION = max(VERSIONS)
