"""Measure how fast a token signs: its library alone, and through the signer's key store. `python bench/tokens.py`.

It makes its own SoftHSM token. For another token, `python bench/tokens.py signer.toml` asks for the PIN, and leaves a
key labelled "paychan reserve" in the token. `bench/signing.py` measures the whole signer on a token.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from hashlib import sha256
from pathlib import Path
from threading import Barrier

sys.path.insert(0, str(Path(__file__).parents[1]))

import machine
import structlog

from paychan.protocol.types import UnixTime
from signer.config import SignerConfig, load_signer_config
from signer.token.keys import TokenKeys, read_pin_and_open
from tests.lib.softhsm import SoftHsm

CLIENT_KEY = bytes.fromhex("0279be667ef9dcbbac55a06295ce870b07029bfcdb2dce28d959f2815b16f81798")
EXPIRY = UnixTime(1_900_000_000)
ROUNDS = 5
"""Rounds of raw and key signatures in turn; the best counts, so other work on the machine affects both equally."""


def signatures_per_second(sign: Callable[[int, bytes], object], threads: int, seconds: float) -> float:
    """Let threads sign at once, and count. `sign` gets the thread's number."""
    begin = Barrier(threads + 1)

    def one(number: int) -> int:
        begin.wait()
        count, end = 0, time.perf_counter() + seconds
        while time.perf_counter() < end:
            sign(number, sha256(b"%d %d" % (number, count)).digest())
            count += 1
        return count

    with ThreadPoolExecutor(threads) as pool:
        counts = [pool.submit(one, number) for number in range(threads)]
        begin.wait()
        return sum(count.result() for count in counts) / seconds


def raw_rate(keys: TokenKeys, threads: int, seconds: float = 1.0) -> float:
    """Measure C_SignInit and C_Sign alone; each thread has its own session and handle."""
    key, sessions = keys.reserve_key(), keys._token._sessions  # noqa: SLF001 - private, to compare with the public method
    mine = [sessions._library.open_session(sessions._slot) for _ in range(threads)]  # noqa: SLF001
    try:
        handle = key._handle  # noqa: SLF001
        return signatures_per_second(lambda number, digest: mine[number].sign(handle, digest), threads, seconds)
    finally:
        for session in mine:
            session.close()


def key_rate(keys: TokenKeys, threads: int, seconds: float = 1.0) -> float:
    """Measure signatures as the signer makes them: session borrowed, signature normalised and verified."""
    key = keys.reserve_key()
    return signatures_per_second(lambda _number, digest: key.sign(digest), threads, seconds)


def pairs_per_second(keys: TokenKeys, count: int = 30) -> float:
    """Measure how fast keys for new channels are made, one after another."""
    begun = time.perf_counter()
    for number in range(count):
        keys.channel_key(CLIENT_KEY, UnixTime(EXPIRY + number), create=True)
    return count / (time.perf_counter() - begun)


@contextmanager
def soft_token() -> Iterator[SignerConfig]:
    """Make a SoftHSM token, and configure this process for it."""
    with tempfile.TemporaryDirectory() as directory:
        token = SoftHsm(Path(directory) / "token")
        os.environ.update(token.environment)
        file = Path(directory) / "signer.toml"
        file.write_text(token.signer_config)
        yield load_signer_config(file)


def opened(config: SignerConfig) -> TokenKeys:
    """Open the token's keys in this process."""
    return TokenKeys(read_pin_and_open(config), per_channel=True)


def main() -> None:
    """Measure, and print the rates."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", nargs="?", type=Path, help="signer.toml of a token other than SoftHSM")
    parser.add_argument("--save", action="store_true", help="write bench/results/token-….json")
    arguments = parser.parse_args()
    with ExitStack() as cleanup:
        config = load_signer_config(arguments.config) if arguments.config else cleanup.enter_context(soft_token())
        keys = opened(config)
        figures = measure(keys, config.pkcs11.sessions, may_make_keys=arguments.config is None)
    unit = figures["verifies_per_second"]
    for name, value in figures.items():
        print(f"{name:32} {value:10,.0f}   {value / unit:.3f} R")
    if arguments.save:
        print(machine.save("token", figures, machine.facts()))


def measure(keys: TokenKeys, sessions: int, *, may_make_keys: bool) -> dict[str, float]:
    """Return all rates per second, R first."""
    figures = {"verifies_per_second": machine.verifies_per_second()}
    for threads in sorted({1, 2, sessions}):
        rounds = [(raw_rate(keys, threads), key_rate(keys, threads)) for _ in range(ROUNDS)]
        raw, key = map(max, zip(*rounds, strict=True))
        figures |= {f"raw_signatures_{threads}_threads": raw, f"key_signatures_{threads}_threads": key}
    if may_make_keys:
        figures["key_pairs"] = pairs_per_second(keys)
    return figures


if __name__ == "__main__":
    main()
