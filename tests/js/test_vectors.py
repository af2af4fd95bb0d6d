"""The vectors of both bindings, as far as they concern a payer, read in Node by the SDKs and the module."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from paychan.protocol.kinds.base import make_terms
from paychan.protocol.types import MAX_MONEY_SAT, OutPoint, Sat
from tests.js.node import HERE, Program, running
from tests.lib.paidvectors import CLIENT, SERVER
from tests.lib.vectors import DIRECTORY

PROTOCOLS = ("x402", "mpp")
ANSWERS = ("PAYMENT-REQUIRED", "PAYMENT-RESPONSE", "WWW-Authenticate", "Payment-Receipt")
"""Headers that a payer reads; it writes the others."""
BEYOND_THE_SDK = ("an offer among other challenges",)
"""mppx does not read a field in which another scheme quotes the word `Payment`."""
OF_THE_PAYMENT = ("signature_encoding", "flag_mismatch", "bad_flag", "bad_signature")


def read(protocol: str, name: str) -> Any:
    return json.loads((DIRECTORY / protocol / f"{name}.json").read_text())


def cases(name: str, *, answers: bool) -> list[Any]:
    found = [(protocol, case) for protocol in PROTOCOLS for case in read(protocol, name)["cases"]]
    return [
        pytest.param(case, id=f"{protocol} {case['name']}")
        for protocol, case in found
        if (case["header"] in ANSWERS) == answers and case["name"] not in BEYOND_THE_SDK
    ]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    with running(tmp_path_factory.mktemp("js"), "vectors.mjs") as started:
        yield started


@pytest.fixture(scope="module")
def channel() -> dict[str, Any]:
    """The channel of the vectors in the module's JSON."""
    shown = read("x402", "valid")["setting"]["channel"]
    return {
        "privateKey": shown["client_private_key"],
        "serverKey": shown["server_public_key"],
        "expiry": shown["expiry"],
        "outpoint": shown["outpoint"],
        "fundingSat": shown["capacity_sat"],
        "changeScript": shown["change_script"],
        "dustSat": shown["dust_sat"],
        "payUrl": "https://pay.example",
        "network": "regtest",
        "settlementPeriodSeconds": 21_600,
        "changeSat": shown["capacity_sat"],
    }


def camel(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(word.capitalize() for word in rest)


def state_of(meaning: Any) -> Any:
    """Return a state of the vectors as the module has it."""
    if meaning is None:
        return None
    newest = meaning["newest"]
    signature = bytes.fromhex(newest["signature"]) if newest else b""
    return {
        "channel": meaning["channel"],
        "capacitySat": meaning["capacity_sat"],
        "acceptedSat": meaning["accepted_sat"],
        "creditSat": meaning["carried_sat"] + meaning["accepted_sat"] - meaning["spent_sat"],
        "proof": newest
        and {
            "changeSat": str(newest["change_sat"]),
            "sighash": signature[-1],
            "signature": signature[:-1].hex(),
        },
    }


@pytest.mark.parametrize("case", cases("valid", answers=True))
def test_answers_mean_the_same(program: Program, case: Any) -> None:
    """An offer, a state and a receipt have the meaning that the vectors say."""
    meaning = program.ask(**case)["meaning"]

    if isinstance(case["meaning"], list):
        (want,) = case["meaning"]
        (got,) = meaning
        assert got.pop("state") == state_of(want["state"])
        assert got == {camel(name): value for name, value in want["offer"].items() if camel(name) in got}
        assert len(got) == len(want["offer"]) - len({"network", "realm", "description"})
    else:
        want = case["meaning"].get("settled", case["meaning"])
        assert meaning["state"] == state_of(want["state"])
        assert meaning["chargedSat"] == want["charged_sat"]


@pytest.mark.parametrize("case", cases("invalid", answers=True))
def test_wrong_answers_are_refused(program: Program, case: Any) -> None:
    """A payer makes nothing of an answer that the vectors call wrong."""
    answer = program.ask(**case)

    assert answer.get("refused") or answer["meaning"] == []


@pytest.mark.parametrize("case", cases("valid", answers=False))
def test_payments_are_the_same_bytes(program: Program, channel: Any, case: Any) -> None:
    """The module signs each payment of the vectors in the same bytes, and knows it as its own."""
    shown = case["json"]["payload"]
    meaning = program.ask(header="payment", channel=channel, payment=shown)["meaning"]

    assert meaning["isOwn"] is True
    assert meaning["signed"] == {name: shown[name] for name in ("changeSat", "sighash", "signature")}


@pytest.mark.parametrize(
    "case",
    [
        each
        for each in cases("invalid", answers=False)
        if each.values[0]["code"] in OF_THE_PAYMENT
        or each.values[0]["name"].startswith(("changeSat", "sighash", "signature"))
    ],
)
def test_wrong_payments_are_no_proof(program: Program, channel: Any, case: Any) -> None:
    """The module does not take a payment whose change value, flag or signature is wrong for its own."""
    value = case["value"].removeprefix("Payment ").replace("-", "+").replace("_", "/").rstrip("=")
    shown = json.loads(base64.b64decode(value + "=" * (-len(value) % 4)))["payload"]
    meaning = program.ask(header="payment", channel=channel, payment=shown)["meaning"]

    assert meaning["isOwn"] is False


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    expiry=st.integers(500_000_000, 2**32 - 1),
    index=st.integers(0, 2**32 - 1),
    script=st.binary(min_size=1, max_size=34),
    change_sat=st.one_of(st.just(0), st.integers(1, MAX_MONEY_SAT)),
)
def test_scripts_and_digests_are_those_of_the_core(
    program: Program, expiry: int, index: int, script: bytes, change_sat: int
) -> None:
    """Script and digest are the same bytes as in Python, for any expiry, output, change script and change value."""
    keys = SERVER.public_key.format(), CLIENT.public_key.format()
    terms, outpoint = make_terms(*keys, expiry), OutPoint(bytes(range(32)), index)
    answer = program.ask(
        header="digest",
        server=keys[0].hex(),
        client=keys[1].hex(),
        expiry=expiry,
        outpoint=str(outpoint),
        change_script=script.hex(),
        change_sat=change_sat,
    )["meaning"]

    assert answer["script"] == terms.redeem_script.hex()
    digest = terms.kind.payment_digest(terms, outpoint, Sat(MAX_MONEY_SAT), script, Sat(change_sat))
    assert answer["digest"] == digest.hex()


def test_the_pinned_packages_come_from_any_registry() -> None:
    """The lock file has a hash of each package and the address of none, so that npm asks the registry it is set to."""
    packages = json.loads((HERE / "package-lock.json").read_text())["packages"]
    pinned = [facts for place, facts in packages.items() if place]

    assert len(pinned) > 10
    assert [facts for facts in pinned if "resolved" in facts or not facts["integrity"].startswith("sha512-")] == []
