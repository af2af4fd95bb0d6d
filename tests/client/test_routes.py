"""The client's requests, byte for byte, compared with those of the original JavaScript client."""

from __future__ import annotations

from urllib.parse import parse_qs, urlsplit

import msgspec
import pytest
from bitcoin.core import CTransaction

from paychan.client import ChannelRecord, Dialect, FundingTooSmall, Payer, Refused, State, TermsUnacceptable, WrongState
from paychan.client.flows.refund import RefundTerms, refund, wif
from paychan.client.limits import Limits, agree
from paychan.client.payer_base import check_url
from paychan.client.transport.routes import close_request, info_path, open_request, pay_request, secret_of
from paychan.protocol.errors import Malformed
from paychan.protocol.types import Network, Sat, UnixTime
from paychan.protocol.wire.rbpcp import FundingInfo, read_v2_body
from tests.lib.vectors import JS_CASES, Case

both_dialects = pytest.mark.parametrize("dialect", Dialect)
all_cases = pytest.mark.parametrize("case", JS_CASES, ids=lambda case: case.name)


def record_of(case: Case, version: int = 1, dialect: Dialect = Dialect.S) -> ChannelRecord:
    """The channel of a vector, as the wallet would store it."""
    return ChannelRecord(
        name="vector",
        url="http://127.0.0.1:8000",
        version=1 if version == 1 else 2,
        dialect=dialect,
        network=case.network,
        private_key=case.client_key.to_hex(),
        server_key=case.terms.server_key.hex(),
        expiry=case.terms.expiry.lock_time,
        funding_address=case.raw["funding_address"],
        created_at=UnixTime(0),
        open_price_sat=Sat(0),
        dust_sat=Sat(546),
        min_confirmations=0,
        settlement_period_hours=6,
        change_address=case.raw["change_address"],
        location="/v1/channels/new?client_pubkey=x",
        funding_outpoint=f"{case.raw['funding_txid']}:{case.raw['funding_vout']}",
        funding_sat=case.funding_sat,
        state=State.OPEN,
    )


@all_cases
def test_v1_payments_equal_those_of_the_javascript_client(case: Case) -> None:
    """Opening, paying and closing each send the `payment` parameter of every vector."""
    record = record_of(case)
    for payment in case.payments:
        signed = record.sign(payment["change_value"])
        for request, method in (
            (open_request(record, signed), "POST"),
            (pay_request(record, signed), "PUT"),
            (close_request(record, signed), "DELETE"),
        ):
            query = parse_qs(urlsplit(request.url).query)
            assert query["payment"] == [payment["payload_base64url"]]
            assert query["client_pubkey"] == ["x"], "the Location's own query stays"
            assert (request.method, request.body) == (method, b"")


@all_cases
@both_dialects
def test_v2_bodies_hold_the_same_payments(case: Case, dialect: Dialect) -> None:
    """Both dialects carry the vectors' signatures, and the vectors' secret."""
    record = record_of(case, version=2, dialect=dialect)
    for payment in case.payments:
        signed = record.sign(payment["change_value"])
        for request in (open_request(record, signed), pay_request(record, signed), close_request(record, signed)):
            read = read_v2_body(request.body)
            assert read.payment.signature_with_flag.hex() == payment["signature_with_flag_hex"]
            assert read.dialect is dialect
        assert secret_of(record, signed) == payment["v2_secret_if_opening_hex"]


def test_the_two_dialects_differ_where_the_published_ones_do() -> None:
    """S: bare opening, reversed txid, plain secret. A: all fields in every body, internal txid, quoted secret."""
    case = JS_CASES[0]
    displayed = case.raw["funding_txid"]
    internal = bytes.fromhex(displayed)[::-1].hex()
    facts = {"redeem_script", "funding_txid", "funding_vout", "change_address", "signature_data", "change_value"}
    for dialect, txid, secret in ((Dialect.S, displayed, "ab"), (Dialect.A, internal, '"ab"')):
        record = msgspec.structs.replace(record_of(case, 2, dialect), secret="ab")
        signed = record.sign(Sat(5_000))
        opening, paying = open_request(record, signed), pay_request(record, signed)
        for request in (opening, paying):
            assert urlsplit(request.url).path == f"/v2/channels/{txid}/{case.outpoint.vout}"
            assert parse_qs(urlsplit(request.url).query) == {"secret": [secret]}
        first, later = msgspec.json.decode(opening.body), msgspec.json.decode(paying.body)
        if dialect is Dialect.S:
            assert set(first) == facts
            assert set(later["payment_data"]) == {"signature_data", "change_value"}
        else:
            assert set(first["payment_data"]) == set(later["payment_data"]) == facts | {"sighash_flag"}
            assert first["application_data"] == ""


def test_the_path_of_funding_info_in_each_version() -> None:
    """v1 by query, v2-S with the expiry first, v2-A with the key first."""
    key = b"\x02" * 33
    assert info_path(1, Dialect.S, key, 7) == f"/v1/fundingInfo?client_pubkey={key.hex()}&exp_time=7"
    assert info_path(2, Dialect.S, key, 7) == f"/v2/funding/7/{key.hex()}/info"
    assert info_path(2, Dialect.A, key, 7) == f"/v2/funding/{key.hex()}/7/info"


@all_cases
def test_refunds_equal_those_of_the_javascript_client(case: Case) -> None:
    """The refund at a fee rate equals the vector's transaction, except that it signals replaceability (BIP125)."""
    wanted = case.raw["refund_per_byte"]
    rate, address = wanted["satoshi_per_byte"], case.raw["refund"]["address"]

    signed = refund(record_of(case), RefundTerms(rate, address, max_fee_sat=case.funding_sat, unchecked=True))

    theirs, ours = (CTransaction.deserialize(raw) for raw in (bytes.fromhex(wanted["tx_hex"]), signed.transaction))
    assert [txin.prevout for txin in ours.vin] == [txin.prevout for txin in theirs.vin]
    assert [out.scriptPubKey for out in ours.vout] == [out.scriptPubKey for out in theirs.vout]
    assert ours.nLockTime == theirs.nLockTime
    assert ours.vin[0].nSequence < 0xFFFFFFFE
    assert abs(signed.fee_sat - wanted["fee"]) <= 2 * rate  # a signature has 70 to 72 bytes


@pytest.mark.parametrize("rate", [1, 9])
def test_a_refund_pays_its_rate_whatever_the_length_of_its_signature(rate: int) -> None:
    """A signature has 70 to 72 bytes; with a fee for a shorter one, nodes do not relay a refund of 1 sat/vB."""
    case = JS_CASES[0]
    for number in range(60):
        record = msgspec.structs.replace(record_of(case), funding_outpoint=f"{case.raw['funding_txid']}:{number}")
        signed = refund(record, RefundTerms(rate, max_fee_sat=case.funding_sat, unchecked=True))
        assert rate * signed.size <= signed.fee_sat <= rate * (signed.size + 4)


@all_cases
def test_keys_are_exported_as_wallets_import_them(case: Case) -> None:
    """The WIF of a channel's key equals that of bitcoinjs."""
    assert wif(record_of(case)) == case.raw["client"]["wif"]


@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost:8000",
        "ftp://x",
        "file:///etc/passwd",
        "http://",
        "http://user:pw@x",
        "http://x?a=b",
        "http://x#y",
    ],
)
def test_only_plain_base_urls_are_accepted(url: str) -> None:
    """A base URL is http or https, host, port and path."""
    with pytest.raises(TermsUnacceptable):
        check_url(url)
    assert check_url("https://shop.example/pay/") == "https://shop.example/pay"


@pytest.mark.parametrize("network", Network)
def test_the_address_determines_the_network(network: Network) -> None:
    """The address tells live from test; regtest must be requested; another network than requested is refused."""
    case = JS_CASES[0]
    terms = case.terms
    info = FundingInfo(terms.server_key.hex(), terms.funding_address(network), Sat(1), 0, 6)
    now = UnixTime(terms.expiry.lock_time - 7 * 3600)

    def judged(wanted: Network | None) -> Network:
        return agree(info, terms.client_key, terms.expiry.lock_time, now, Limits(), wanted).network

    assert judged(network) is network
    assert judged(None) is (Network.LIVE if network is Network.LIVE else Network.TEST)
    with pytest.raises((TermsUnacceptable, Refused)):
        judged(Network.TEST if network is Network.LIVE else Network.LIVE)


def test_bip21_amounts_are_exact(tmp_path) -> None:
    """The URI shows whole bitcoins with eight digits, without floating point."""
    with Payer(wallet=tmp_path) as payer:
        record = record_of(JS_CASES[0])
        payer.wallet.create(record).release()
        channel = payer.channel("vector")

        assert channel.bip21(1) == f"bitcoin:{record.funding_address}?amount=0.00000001"
        assert channel.bip21(2_100_000_000_000_001).endswith("?amount=21000000.00000001")


def test_funding_is_recorded_once_and_suffices(tmp_path) -> None:
    """Funding must cover open price and dust limit, is never derived on the live network, and comes before opening."""
    live = next(case for case in JS_CASES if case.network is Network.LIVE)
    new = {"state": State.NEW, "funding_outpoint": "", "funding_sat": Sat(0), "open_price_sat": Sat(10_000)}
    with Payer(wallet=tmp_path) as payer:
        payer.wallet.create(msgspec.structs.replace(record_of(live), **new)).release()
        channel = payer.channel("vector")
        with pytest.raises(TermsUnacceptable, match="live"):
            channel.fund_debug()
        with pytest.raises(WrongState, match="not funded"):
            channel.open()
        with pytest.raises(WrongState, match="not funded"):
            channel.refund()
        with pytest.raises(FundingTooSmall) as caught:
            channel.fund("ab" * 32 + ":0", 10_545, unchecked=True)
        assert caught.value.fields == {"got_sat": 10_545, "need_sat": 10_546}
        for text in ("ab" * 32, "ab" * 32 + ":-1", "AB" * 32 + ":0", "ab" * 32 + ":4294967296", ":0"):
            with pytest.raises(Malformed):
                channel.fund(text, 10_546, unchecked=True)

        channel.fund("ab" * 32 + ":0", 10_546, unchecked=True)

        assert channel.left_sat == 10_546
