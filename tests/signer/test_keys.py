"""Key derivation with published vectors, and the properties of the trees."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bitcoin.base58
import pytest
from bitcoin.core import Hash
from coincurve import PublicKey

from paychan.protocol.address import encode_address, key_script
from paychan.protocol.keytree import HARDENED, Node
from paychan.protocol.kinds.base import make_terms
from paychan.protocol.payment import encoding_problem
from paychan.protocol.types import Network, UnixTime
from signer.keys.ring import (
    CACHED_CHILDREN,
    DEBUG_KEY,
    KeyRing,
    KeysFailed,
    KeySource,
    SigningKey,
    StaticKey,
    TreeKeys,
    channel_words,
    hardened_keys,
    rbpcp_v2_keys,
)
from tests.lib import background
from tests.lib.looped import looped
from tests.lib.vectors import read_vectors
from tests.signer.messages import CLIENT_KEY, EXPIRY

SEED = bytes(range(32))
OTHER_CLIENT_KEY = PublicKey.from_secret(b"\x07" * 32).format()
BIP32_CASES = json.loads(Path(__file__).with_name("bip32_vectors.json").read_text())["cases"]
HD_CASES = read_vectors("rbpcp_v2_hd.json")["cases"]


def channel_key(source: KeySource, client_key: bytes = CLIENT_KEY, expiry: UnixTime = EXPIRY) -> SigningKey:
    key = source.channel_key(client_key, expiry, create=False)
    assert key is not None
    return key


def destination_script(source: KeySource, client_key: bytes = CLIENT_KEY, expiry: UnixTime = EXPIRY) -> bytes:
    key = source.destination_key(client_key, expiry)
    assert key is not None
    return key_script(key.public_key)


each_tree = pytest.mark.parametrize("make_keys", [hardened_keys, rbpcp_v2_keys])


def parse_path(path: str) -> list[int]:
    """Indices of a path such as m/0'/1."""
    return [int(step.rstrip("'")) | (HARDENED if step.endswith("'") else 0) for step in path.split("/")[1:]]


@looped("case", BIP32_CASES, ids=lambda case: case["seed_hex"][:8])
def test_nodes_are_those_of_bip32(case: dict[str, Any]) -> None:
    """Keys and chain codes along BIP32's test vectors 1 to 4 are those of the published extended keys."""
    root = Node.from_seed(bytes.fromhex(case["seed_hex"]))
    for link in case["chain"]:
        raw = bytes(bitcoin.base58.decode(link["xprv"]))
        assert Hash(raw[:78])[:4] == raw[78:]

        node = root.descend(parse_path(link["path"]))

        assert (node.chain_code, node.key.secret) == (raw[13:45], raw[46:78]), link["path"]


@looped("case", HD_CASES, ids=lambda case: case["id"])
def test_policy_template_and_destination_of_rbpcp_v2(case: dict[str, Any]) -> None:
    """Server key and destination of a channel are those that bitcoinjs derives by RBPCP §9.2."""
    keys = rbpcp_v2_keys(bytes.fromhex(case["root_seed_hex"]))
    client_key, expiry = bytes.fromhex(case["client"]["pubkey_hex"]), UnixTime(case["exp_time"])

    assert channel_words(client_key, expiry) == case["indices"]
    assert channel_key(keys, client_key, expiry).public_key.hex() == case["server_pubkey_hex"]
    address = encode_address(destination_script(keys, client_key, expiry), Network(case["network"]))
    assert address == case["server_destination_address"]


def test_debug_key_is_the_published_one() -> None:
    """The debug key's public key is the one in the original's benchmark example (RBPCP §9.1), with no destination."""
    keys = StaticKey(DEBUG_KEY)

    assert channel_key(keys).public_key.hex() == "0225b3aaf58992a8cc909522c2ec859ef218fd29fda0a6723cfb4e0529f80cc8f3"
    assert keys.reserve_key().public_key == channel_key(keys).public_key
    assert keys.destination_key(CLIENT_KEY, EXPIRY) is None


def test_threat_38_hardened_keys_are_those_of_the_documented_paths() -> None:
    """Channel keys are at m/"pchk"'/w1'/w2'/w3'/w4', destinations at m/"pchd"'/w1'/w2'/w3'/w4'."""
    keys = hardened_keys(SEED)
    words = [word | HARDENED for word in channel_words(CLIENT_KEY, EXPIRY)]

    def public_key(purpose: bytes) -> bytes:
        path = [int.from_bytes(purpose, "big") | HARDENED, *words]
        return Node.from_seed(SEED).descend(path).key.public_key.format()

    assert channel_key(keys).public_key == public_key(b"pchk")
    assert destination_script(keys) == key_script(public_key(b"pchd"))


@each_tree
def test_reserve_key_is_that_of_the_documented_path(make_keys: Any) -> None:
    """The reserve's key is at m/"pchr"'/0' in both trees: a switch of `key.mode` does not lose its coins."""
    keys: TreeKeys = make_keys(SEED)
    node = Node.from_seed(SEED).descend([int.from_bytes(b"pchr", "big") | HARDENED, HARDENED])

    assert keys.reserve_key().public_key == node.key.public_key.format()
    assert keys.reserve_key().public_key.hex() == FROZEN_RESERVE_KEY


@each_tree
def test_identity_key_is_that_of_the_documented_path(make_keys: Any) -> None:
    """The identity key is at m/"pchi"'/0' in both trees: a switch of `key.mode` does not change it, nor a release."""
    keys: TreeKeys = make_keys(SEED)
    node = Node.from_seed(SEED).descend([int.from_bytes(b"pchi", "big") | HARDENED, HARDENED])

    assert keys.identity_key().public_key == node.key.public_key.format()
    assert keys.identity_key().public_key.hex() == FROZEN_IDENTITY_KEY


def test_the_debug_identity_is_no_channel_key() -> None:
    """The identity key of debug mode is frozen, too, and is not the key that all channels share."""
    keys = StaticKey(DEBUG_KEY)

    assert keys.identity_key().public_key.hex() == DEBUG_IDENTITY_KEY
    assert keys.identity_key().public_key != channel_key(keys).public_key


def test_hardened_keys_never_change() -> None:
    """A seed gives the same keys in every release: another path would lose the coins of open channels."""
    keys = hardened_keys(SEED)

    assert channel_key(keys).public_key.hex() == FROZEN_KEY
    assert destination_script(keys).hex() == FROZEN_DESTINATION


FROZEN_KEY = "031eb790a829a34a5ff44963335e96559f790f891f49b51c52bc49346ec4d1804e"
FROZEN_RESERVE_KEY = "03c7ac67a4d423bf4b6a1fa812a8a11d12aa5306278fa62c383917b9a22565f6ad"
FROZEN_IDENTITY_KEY = "03e2bbb21b4e9238822b2468a2c1fae0802dda4d87ff82143e4b162b0b5501e5a2"
DEBUG_IDENTITY_KEY = "02c340d48e956cfbe65f5469032cad18be491c5daa86010c4af7f4f627d8278376"
FROZEN_DESTINATION = "76a914f4fa0a8ee2ac0b4c6ee52a9477500cde32affa4b88ac"


@each_tree
def test_threat_38_every_channel_has_its_own_key_and_destination(make_keys: Any) -> None:
    """Another client key or another expiry gives another server key and destination, and no destination is a key."""
    keys: TreeKeys = make_keys(SEED)
    channels = [(key, UnixTime(EXPIRY + n)) for key in (CLIENT_KEY, OTHER_CLIENT_KEY) for n in range(5)]

    own = [key_script(channel_key(keys, *channel).public_key) for channel in channels]
    own += [key_script(key.public_key) for key in (keys.reserve_key(), keys.identity_key())]
    destinations = [destination_script(keys, *channel) for channel in channels]

    assert len({*own, *destinations}) == 22


def test_trees_of_one_seed_are_disjoint() -> None:
    """Another `key.mode` on the same seed gives only other keys and destinations."""
    first, second = hardened_keys(SEED), rbpcp_v2_keys(SEED)

    assert channel_key(first).public_key != channel_key(second).public_key
    assert destination_script(first) != destination_script(second)


@looped("keys", [hardened_keys(SEED), rbpcp_v2_keys(SEED), StaticKey(SEED)], ids=["hardened", "rbpcp-v2", "static"])
def test_signatures_verify_and_are_deterministic(keys: KeySource) -> None:
    """Signatures of all keys are strict DER with low S, verify, and are the same every time (RFC 6979)."""
    destination = keys.destination_key(CLIENT_KEY, EXPIRY)
    for key in (channel_key(keys), keys.reserve_key(), keys.identity_key(), *([destination] if destination else [])):
        for number in range(20):
            digest = bytes([number]) * 32

            signature = sign(key, digest)

            assert encoding_problem(signature) is None
            assert PublicKey(key.public_key).verify(signature, digest, hasher=None)
            assert sign(key, digest) == signature


def sign(key: SigningKey, digest: bytes = bytes(32)) -> bytes:
    return background.run(key.sign, digest)


# --- the ring of generations -----------------------------------------------------------------------------------------

GENERATIONS = [hardened_keys(bytes([number]) * 32) for number in range(3)]


class OtherKeys:
    """A source that has no key, or fails."""

    def __init__(self, failure: Exception | None = None) -> None:
        self.failure = failure

    def channel_key(self, *_channel: Any, create: bool) -> SigningKey | None:  # noqa: ARG002 - it never makes any
        return self._answer()

    def destination_key(self, *_channel: Any) -> SigningKey | None:
        return self._answer()

    def reserve_key(self) -> SigningKey:
        self._answer()
        return GENERATIONS[0].reserve_key()

    def identity_key(self) -> SigningKey:
        self._answer()
        return GENERATIONS[0].identity_key()

    def _answer(self) -> None:
        if self.failure is not None:
            raise self.failure


def test_new_channels_get_the_newest_key() -> None:
    """Only the first generation makes keys for new channels, and for the reserve."""
    ring = KeyRing(GENERATIONS)

    assert ring.new(CLIENT_KEY, EXPIRY).public_key == channel_key(GENERATIONS[0]).public_key
    assert ring.reserve().public_key == GENERATIONS[0].reserve_key().public_key
    assert ring.identity() == GENERATIONS[0].identity_key().public_key
    with pytest.raises(KeysFailed):
        KeyRing([OtherKeys(), *GENERATIONS]).new(CLIENT_KEY, EXPIRY)


@looped("number", range(3))
def test_keys_of_all_generations_are_found(number: int) -> None:
    """A channel's key and a reserve's are found in any generation; no other key is."""
    ring = KeyRing(GENERATIONS)
    key, reserve = channel_key(GENERATIONS[number]), GENERATIONS[number].reserve_key()

    found = ring.find(make_terms(key.public_key, CLIENT_KEY, EXPIRY))
    found_reserve = ring.find_reserve(reserve.public_key)

    assert found is not None
    assert found_reserve is not None
    assert sign(found) == sign(key)
    assert found_reserve.key is not None
    assert sign(found_reserve.key) == sign(reserve)
    assert found_reserve.retired == (number > 0)
    assert ring.find(make_terms(key.public_key, CLIENT_KEY, UnixTime(EXPIRY + 1))) is None
    assert ring.find(make_terms(OTHER_CLIENT_KEY, CLIENT_KEY, EXPIRY)) is None
    assert ring.find_reserve(OTHER_CLIENT_KEY) is None


def test_destinations_come_in_the_order_in_which_they_should_be_paid() -> None:
    """The order is: the configured address, without a key; the derived ones, the newest first; the previous ones."""
    derived = [destination_script(keys) for keys in GENERATIONS]
    address, previous = key_script(OTHER_CLIENT_KEY), [key_script(CLIENT_KEY)]

    configured = list(KeyRing(GENERATIONS, address, previous).destinations(CLIENT_KEY, EXPIRY))
    without = list(KeyRing([OtherKeys(), *GENERATIONS]).destinations(CLIENT_KEY, EXPIRY))

    assert [each.script for each in configured] == [address, *derived, *previous]
    assert [each.key is None for each in configured] == [True, False, False, False, True]
    assert [each.script for each in without] == derived
    for each in without:
        assert each.key is not None
        assert key_script(each.key.public_key) == each.script


def test_failures_of_a_source_are_passed_on() -> None:
    """The ring does not skip a generation that fails: its channels would look like foreign ones."""
    failing = KeyRing([OtherKeys(KeysFailed("away")), *GENERATIONS])
    for ask in (
        lambda: failing.new(CLIENT_KEY, EXPIRY),
        lambda: failing.find(make_terms(channel_key(GENERATIONS[0]).public_key, CLIENT_KEY, EXPIRY)),
        lambda: list(failing.destinations(CLIENT_KEY, EXPIRY)),
        failing.reserve,
        failing.identity,
    ):
        with pytest.raises(KeysFailed, match="away"):
            ask()


def test_threat_42_nothing_that_holds_a_key_shows_it() -> None:
    """`repr` and `str` of key stores, nodes and their parts contain no part of a key or seed."""
    node = Node.from_seed(SEED)
    tree = hardened_keys(SEED)
    holders: list[Any] = [
        node,
        node.key,
        tree,
        StaticKey(SEED),
        KeyRing([tree]),
        channel_key(tree),
        [tree],
        {"keys": tree},
    ]
    holders += [getattr(tree, name) for name in tree.__slots__]

    for holder in holders:
        shown = repr(holder) + str(holder)
        for secret in (SEED, node.key.secret, node.chain_code):
            assert secret.hex() not in shown
            assert str(secret) not in shown
            assert str(int.from_bytes(secret, "big")) not in shown


def test_cache_of_children_is_bounded() -> None:
    """For any number of requested channels, only the newest children are kept."""
    keys = hardened_keys(SEED)
    for name in ("_channel_key", "_destination_key"):
        assert getattr(keys, name).cache_parameters()["maxsize"] == CACHED_CHILDREN
