"""Key derivation against other people's vectors, and what the trees promise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bitcoin.base58
import pytest
from bitcoin.core import Hash
from coincurve import PublicKey

from paychan.protocol.address import encode_address, key_script
from paychan.protocol.payment import encoding_problem
from paychan.protocol.types import Network, UnixTime
from signer.keys import (
    CACHED_CHILDREN,
    DEBUG_KEY,
    HARDENED,
    Keys,
    Node,
    StaticKey,
    channel_words,
    hardened_keys,
    rbpcp_v2_keys,
)
from tests.lib.vectors import read_vectors
from tests.signer.messages import CLIENT_KEY, EXPIRY

SEED = bytes(range(32))
OTHER_CLIENT_KEY = PublicKey.from_secret(b"\x07" * 32).format()
BIP32_CASES = json.loads(Path(__file__).with_name("bip32_vectors.json").read_text())["cases"]
HD_CASES = read_vectors("rbpcp_v2_hd.json")["cases"]

each_tree = pytest.mark.parametrize("make_keys", [hardened_keys, rbpcp_v2_keys])


def parse_path(path: str) -> list[int]:
    """Indices of a path such as m/0'/1."""
    return [int(step.rstrip("'")) | (HARDENED if step.endswith("'") else 0) for step in path.split("/")[1:]]


@pytest.mark.parametrize("case", BIP32_CASES, ids=lambda case: case["seed_hex"][:8])
def test_nodes_are_those_of_bip32(case: dict[str, Any]) -> None:
    """Keys and chain codes along BIP32's test vectors 1 to 4 are those of the published extended keys."""
    root = Node.from_seed(bytes.fromhex(case["seed_hex"]))
    for link in case["chain"]:
        raw = bytes(bitcoin.base58.decode(link["xprv"]))
        assert Hash(raw[:78])[:4] == raw[78:]

        node = root.descend(parse_path(link["path"]))

        assert (node.chain_code, node.key.secret) == (raw[13:45], raw[46:78]), link["path"]


@pytest.mark.parametrize("case", HD_CASES, ids=lambda case: case["id"])
def test_policy_template_and_destination_of_rbpcp_v2(case: dict[str, Any]) -> None:
    """Server key and destination of a channel are those that bitcoinjs derives by PROTOCOL §9.2."""
    keys = rbpcp_v2_keys(bytes.fromhex(case["root_seed_hex"]))
    client_key, expiry = bytes.fromhex(case["client"]["pubkey_hex"]), UnixTime(case["exp_time"])

    assert channel_words(client_key, expiry) == case["indices"]
    assert keys.public_key(client_key, expiry).hex() == case["server_pubkey_hex"]
    address = encode_address(keys.destination_script(client_key, expiry), Network(case["network"]))
    assert address == case["server_destination_address"]


def test_debug_key_is_the_published_one() -> None:
    """The debug key's public key is the one in the original's benchmark example (PROTOCOL §9.1)."""
    keys = StaticKey(DEBUG_KEY, key_script(CLIENT_KEY))

    assert keys.public_key(CLIENT_KEY, EXPIRY).hex() == (
        "0225b3aaf58992a8cc909522c2ec859ef218fd29fda0a6723cfb4e0529f80cc8f3"
    )
    assert keys.destination_script(CLIENT_KEY, EXPIRY) == key_script(CLIENT_KEY)


def test_hardened_keys_are_those_of_the_documented_paths() -> None:
    """Channel keys are at m/"pchk"'/w1'/w2'/w3'/w4', destinations at m/"pchd"'/w1'/w2'/w3'/w4'."""
    keys = hardened_keys(SEED)
    words = [word | HARDENED for word in channel_words(CLIENT_KEY, EXPIRY)]

    def public_key(purpose: bytes) -> bytes:
        path = [int.from_bytes(purpose, "big") | HARDENED, *words]
        return Node.from_seed(SEED).descend(path).key.public_key.format()

    assert keys.public_key(CLIENT_KEY, EXPIRY) == public_key(b"pchk")
    assert keys.destination_script(CLIENT_KEY, EXPIRY) == key_script(public_key(b"pchd"))


@each_tree
def test_reserve_key_is_that_of_the_documented_path(make_keys: Any) -> None:
    """The reserve's key is at m/"pchr"'/0' in both trees: switching `key.mode` does not lose its coins."""
    keys: Keys = make_keys(SEED)
    node = Node.from_seed(SEED).descend([int.from_bytes(b"pchr", "big") | HARDENED, HARDENED])

    assert keys.reserve_key() == node.key.public_key.format()
    assert keys.reserve_key().hex() == FROZEN_RESERVE_KEY
    assert make_keys(SEED, key_script(OTHER_CLIENT_KEY)).reserve_key() == keys.reserve_key()


def test_hardened_keys_stay_what_they_are() -> None:
    """A seed gives the same keys in every release: another path would lose the coins of open channels."""
    keys = hardened_keys(SEED)

    assert keys.public_key(CLIENT_KEY, EXPIRY).hex() == FROZEN_KEY
    assert keys.destination_script(CLIENT_KEY, EXPIRY).hex() == FROZEN_DESTINATION


FROZEN_KEY = "031eb790a829a34a5ff44963335e96559f790f891f49b51c52bc49346ec4d1804e"
FROZEN_RESERVE_KEY = "03c7ac67a4d423bf4b6a1fa812a8a11d12aa5306278fa62c383917b9a22565f6ad"
FROZEN_DESTINATION = "76a914f4fa0a8ee2ac0b4c6ee52a9477500cde32affa4b88ac"


@each_tree
def test_every_channel_has_its_own_key_and_destination(make_keys: Any) -> None:
    """Another client key or another expiry gives another server key and destination, and no destination is a key."""
    keys: Keys = make_keys(SEED)
    channels = [(key, UnixTime(EXPIRY + n)) for key in (CLIENT_KEY, OTHER_CLIENT_KEY) for n in range(5)]

    own = [key_script(keys.public_key(*channel)) for channel in channels] + [key_script(keys.reserve_key())]
    destinations = [keys.destination_script(*channel) for channel in channels]

    assert len({*own, *destinations}) == 21


@each_tree
def test_configured_destination_stands_for_all(make_keys: Any) -> None:
    """With a destination of the operator's, no channel has one of its own."""
    keys: Keys = make_keys(SEED, key_script(OTHER_CLIENT_KEY))

    assert keys.destination_script(CLIENT_KEY, EXPIRY) == key_script(OTHER_CLIENT_KEY)


def test_trees_of_one_seed_do_not_meet() -> None:
    """Switching `key.mode` on the same seed gives other keys and destinations throughout."""
    first, second = hardened_keys(SEED), rbpcp_v2_keys(SEED)

    assert first.public_key(CLIENT_KEY, EXPIRY) != second.public_key(CLIENT_KEY, EXPIRY)
    assert first.destination_script(CLIENT_KEY, EXPIRY) != second.destination_script(CLIENT_KEY, EXPIRY)


@pytest.mark.parametrize("keys", [hardened_keys(SEED), rbpcp_v2_keys(SEED), StaticKey(SEED, b"")], ids=repr)
def test_signatures_verify_and_are_deterministic(keys: Keys) -> None:
    """A signature is strict DER with low S, verifies with the channel's key, and is the same every time (RFC 6979)."""
    for number in range(20):
        digest = bytes([number]) * 32

        signature = keys.sign(CLIENT_KEY, EXPIRY, digest)

        assert encoding_problem(signature) is None
        assert PublicKey(keys.public_key(CLIENT_KEY, EXPIRY)).verify(signature, digest, hasher=None)
        assert keys.sign(CLIENT_KEY, EXPIRY, digest) == signature


@pytest.mark.parametrize("keys", [hardened_keys(SEED), rbpcp_v2_keys(SEED), StaticKey(SEED, b"")], ids=repr)
def test_signatures_of_reserve_and_destination_verify(keys: Keys) -> None:
    """The reserve's signatures verify with its key, and a derived destination's with the key behind it."""
    signatures = [(keys.reserve_key(), keys.sign_reserve(bytes(32)))]
    destination = keys.destination_key(CLIENT_KEY, EXPIRY)
    if destination is not None:
        signatures.append((destination, keys.sign_destination(CLIENT_KEY, EXPIRY, bytes(32))))

    for public_key, signature in signatures:
        assert encoding_problem(signature) is None
        assert PublicKey(public_key).verify(signature, bytes(32), hasher=None)


def test_nothing_that_holds_a_key_shows_it() -> None:
    """`repr` and `str` of key stores, nodes and of what they are made of contain no part of a key or seed."""
    node = Node.from_seed(SEED)
    tree = hardened_keys(SEED)
    holders: list[Any] = [node, node.key, tree, StaticKey(SEED, b""), [tree], {"keys": tree}]
    holders += [getattr(tree, name) for name in tree.__slots__]

    for holder in holders:
        shown = repr(holder) + str(holder)
        for secret in (SEED, node.key.secret, node.chain_code):
            assert secret.hex() not in shown
            assert str(secret) not in shown
            assert str(int.from_bytes(secret, "big")) not in shown


def test_cache_of_children_is_bounded() -> None:
    """However many channels are asked for, only the newest children are kept."""
    keys = hardened_keys(SEED)
    for name in ("_channel_key", "_destination_key"):
        assert getattr(keys, name).cache_parameters()["maxsize"] == CACHED_CHILDREN
