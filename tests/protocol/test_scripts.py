"""Keys, expiries and the redeem script: only the one template is accepted, no similar script (RBPCP §2)."""

from __future__ import annotations

import pytest
from coincurve import PublicKey

from paychan.protocol.errors import ExpiryNotATime, KeyReuse, Malformed, PaychanError
from paychan.protocol.expiry import MAX_EXPIRY, MIN_EXPIRY, Expiry, check_expiry
from paychan.protocol.keys import check_public_key, parse_public_key
from paychan.protocol.kinds.base import ChannelTerms, make_terms
from paychan.protocol.kinds.p2sh import encode_script_number, parse_redeem_script
from paychan.protocol.types import Network
from tests.lib.channels import private_key
from tests.lib.looped import looped

SERVER, CLIENT = (private_key(seed).public_key.format() for seed in ("script server", "script client"))
COMPRESSED = CLIENT
UNCOMPRESSED = private_key("script client").public_key.format(compressed=False)
X_NOT_ON_CURVE = b"\x02" + (5).to_bytes(32, "big")
FIELD_PRIME = 2**256 - 2**32 - 977

# --- public keys ----------------------------------------------------------------------------------------------------


@looped(
    "raw",
    [
        UNCOMPRESSED,
        bytes([6 + (UNCOMPRESSED[64] & 1)]) + UNCOMPRESSED[1:],
        b"\x04" + COMPRESSED[1:],
        b"\x00" + COMPRESSED[1:],
        b"\x05" + COMPRESSED[1:],
        X_NOT_ON_CURVE,
        b"\x02" + bytes(32),
        b"\x02" + FIELD_PRIME.to_bytes(32, "big"),
        b"\x03" + b"\xff" * 32,
        COMPRESSED[:-1],
        COMPRESSED + b"\x00",
        b"",
        b"\x00",
    ],
    ids=[
        "uncompressed",
        "hybrid",
        "33 bytes of an uncompressed prefix",
        "prefix 00",
        "prefix 05",
        "x not on the curve",
        "x is zero",
        "x is the field prime",
        "x above the field prime",
        "32 bytes",
        "34 bytes",
        "empty",
        "point at infinity",
    ],
)
def test_threat_17_only_compressed_points_are_keys(raw: bytes) -> None:
    """Everything except 33 bytes of a compressed point is refused, also encodings that coincurve accepts."""
    with pytest.raises(Malformed):
        check_public_key(raw)
    with pytest.raises(Malformed):
        parse_public_key(raw.hex())


def test_coincurve_would_take_them() -> None:
    """The length check is needed: libsecp256k1 reads uncompressed and hybrid keys as the same key."""
    for prefix in (4, 6 + (UNCOMPRESSED[64] & 1)):
        assert PublicKey(bytes([prefix]) + UNCOMPRESSED[1:]).format() == COMPRESSED


@looped(
    "text",
    [
        COMPRESSED.hex().upper(),
        COMPRESSED.hex()[:-1] + "A",
        " " + COMPRESSED.hex(),
        COMPRESSED.hex() + "\n",
        COMPRESSED.hex()[:2] + " " + COMPRESSED.hex()[2:],
        "0x" + COMPRESSED.hex(),
        COMPRESSED.hex()[:-1],
        COMPRESSED.hex() + "00",
        COMPRESSED.hex()[:-1] + "\u0661",
        "",
    ],
)
def test_threat_27_keys_are_lower_case_hex(text: str) -> None:
    """Spaces, upper case, prefixes and foreign digits are refused."""
    with pytest.raises(Malformed):
        parse_public_key(text)


def test_a_key_in_lower_case_hex_is_read() -> None:
    """The usual text of a key is its bytes."""
    assert parse_public_key(COMPRESSED.hex()) == COMPRESSED


def test_threat_38_equal_keys_are_refused() -> None:
    """If both keys of a channel were equal, the client could settle alone."""
    with pytest.raises(KeyReuse, match=SERVER.hex()):
        make_terms(SERVER, SERVER, MIN_EXPIRY)


# --- expiry ---------------------------------------------------------------------------------------------------------


@looped("value", [-1, 0, 1, 499_999_999, 2**32, 2**32 + 500_000_000, 2**63, 10**40])
def test_threat_7_expiries_that_are_no_time_are_refused(value: int) -> None:
    """Block heights, and numbers above 32 bits, are refused and never wrapped."""
    with pytest.raises(ExpiryNotATime, match=f"got {value}, need 500000000 to 4294967295"):
        check_expiry(value)
    with pytest.raises(ExpiryNotATime):
        make_terms(SERVER, CLIENT, value)


@looped(
    ("value", "push"),
    [
        (500_000_000, "0065cd1d"),
        (1_500_000_000, "002f6859"),
        (2**31 - 1, "ffffff7f"),
        (2**31, "0000008000"),
        (2**31 + 1, "0100008000"),
        (2**32 - 1, "ffffffff00"),
    ],
)
def test_threat_7_times_are_pushed_minimally(value: int, push: str) -> None:
    """Both ends of the range and both sides of 2038 are pushed in shortest form, positive for BIP65."""
    terms = make_terms(SERVER, CLIENT, value)

    assert encode_script_number(value).hex() == push
    assert bytes.fromhex(f"67{len(push) // 2:02x}{push}b1") in terms.redeem_script
    assert parse_redeem_script(terms.redeem_script) == terms


@looped(
    ("number", "want"),
    [
        ("0065cd1d00", Malformed),  # five bytes where four suffice
        ("ffffff7f00", Malformed),
        ("ffffffff", Malformed),  # negative for BIP65: the sign bit is set
        ("00000080", Malformed),  # negative zero
        ("ffffffff80", ExpiryNotATime),  # a negative number of five bytes
        ("0000000001", ExpiryNotATime),  # 2**32
        ("ffc99a3b", None),
        ("ffffcc1d", ExpiryNotATime),  # a block height in four bytes
        ("ff64cd1d", ExpiryNotATime),  # 499999999
    ],
)
def test_threat_7_expiries_in_a_script(number: str, want: type[PaychanError] | None) -> None:
    """A script whose expiry is not minimal, negative, a height, or above 32 bits is refused."""
    raw = bytes.fromhex(number)
    script = _script(bytes([len(raw)]) + raw)

    if want is None:
        assert parse_redeem_script(script).expiry.lock_time == int.from_bytes(raw, "little")
    else:
        with pytest.raises(want):
            parse_redeem_script(script)


# --- the template ---------------------------------------------------------------------------------------------------


def _script(expiry_push: bytes, server: bytes = SERVER, client: bytes = CLIENT) -> bytes:
    return b"\x63\x21" + server + b"\xad\x67" + expiry_push + b"\xb1\x75\x68\x21" + client + b"\xac"


def test_the_documented_example() -> None:
    """The worked example of RBPCP §2 gives its script and its addresses on both networks."""
    terms = make_terms(
        bytes.fromhex("0225b3aaf58992a8cc909522c2ec859ef218fd29fda0a6723cfb4e0529f80cc8f3"),
        bytes.fromhex("03da3afe4f58992a8cc909522c2ec859ef218fd92fda0a67c23fb40e0303030405"),
        1_500_000_000,
    )

    assert terms.redeem_script.hex() == (
        "63210225b3aaf58992a8cc909522c2ec859ef218fd29fda0a6723cfb4e0529f80cc8f3ad6704002f6859b17568"
        "2103da3afe4f58992a8cc909522c2ec859ef218fd92fda0a67c23fb40e0303030405ac"
    )
    assert terms.funding_address(Network.TEST) == "2NEQahmapUBueLzinJEViGkLdXRrzskH7Px"
    assert terms.funding_address(Network.LIVE) == "3NrNe2enrjQJ9D6Ed6sqeoMNK5eq8wGp7P"


@looped("expiry", [1_500_000_000, 2**31], ids=["80 bytes", "81 bytes"])
def test_every_changed_byte_is_refused_or_is_another_channel(expiry: int) -> None:
    """All 255 changes of all bytes: refused, or read as terms whose script is exactly the changed bytes."""
    terms = make_terms(SERVER, CLIENT, expiry)
    script = terms.redeem_script
    read = 0
    for position in range(len(script)):
        for value in set(range(256)) - {script[position]}:
            changed = script[:position] + bytes([value]) + script[position + 1 :]
            other = _parsed(changed)
            if other is not None:
                read += 1
                assert other.redeem_script == changed
                assert other != terms

    assert read > 1000  # other expiries, and x coordinates that are on the curve


def _parsed(script: bytes) -> ChannelTerms | None:
    try:
        return parse_redeem_script(script)
    except PaychanError:
        return None


@looped("cut", range(81))
def test_truncated_scripts_are_refused(cut: int) -> None:
    """A script that ends early is refused at every length, without reading past its end."""
    with pytest.raises(PaychanError):
        parse_redeem_script(make_terms(SERVER, CLIENT, 2**31).redeem_script[:cut])


@looped("tail", [b"\x00", b"\xac", b"\x61", bytes(81), bytes(10_000)])
def test_threat_19_longer_scripts_are_refused(tail: bytes) -> None:
    """Nothing may follow the template (threat 19)."""
    with pytest.raises(Malformed):
        parse_redeem_script(make_terms(SERVER, CLIENT, MAX_EXPIRY).redeem_script + tail)


def test_threat_19_an_expiry_pushed_with_pushdata1_is_refused() -> None:
    """A script of the right length whose expiry is pushed by OP_PUSHDATA1 is not the template (threat 19)."""
    with pytest.raises(Malformed):
        parse_redeem_script(_script(b"\x4c\x04" + (1_500_000_000).to_bytes(4, "little")))


def test_threat_38_a_script_with_one_key_twice_is_refused() -> None:
    """The rule for keys applies to scripts too (threat 38)."""
    with pytest.raises(KeyReuse):
        parse_redeem_script(_script(b"\x04" + (1_500_000_000).to_bytes(4, "little"), CLIENT, CLIENT))


@looped("place", [slice(2, 35), slice(46, 79)], ids=["server key", "client key"])
def test_a_script_whose_key_is_no_point_is_refused(place: slice) -> None:
    """Both keys of a script must be on the curve; otherwise the coins would be lost."""
    script = bytearray(make_terms(SERVER, CLIENT, 1_500_000_000).redeem_script)
    script[place] = X_NOT_ON_CURVE

    with pytest.raises(Malformed, match="redeem_script: not a point"):
        parse_redeem_script(bytes(script))


def test_terms_are_values() -> None:
    """Terms with equal parts are equal, so a record can be compared with a request."""
    assert ChannelTerms("p2sh", SERVER, CLIENT, Expiry(MIN_EXPIRY)) == make_terms(SERVER, CLIENT, MIN_EXPIRY)
