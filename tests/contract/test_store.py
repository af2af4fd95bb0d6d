"""The store's contract (`paychan/store/base.py`), checked for every backend."""

from __future__ import annotations

import asyncio
import random
import tempfile
import threading
from collections import Counter
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest
import structlog
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from paychan.protocol.channel import Channel, State
from paychan.protocol.errors import DamagedRecord
from paychan.protocol.expiry import Expiry
from paychan.protocol.record import decode_record, encode_record
from paychan.protocol.types import UnixTime
from paychan.store.base import Change, Store, StoreFailed, walk
from tests.contract.backends import BACKENDS, Backend
from tests.lib.channels import Payer, many

replace = msgspec.structs.replace


def later(channel: Channel) -> Channel:
    """Return the next version of a channel."""
    return replace(channel, seq=channel.seq + 1, payments=channel.payments + 1)


async def put(store: Store, *channels: Channel) -> None:
    """Store fresh channels."""
    assert all(await store.commit([Change(None, channel) for channel in channels]))


# --- durable --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", State)
async def test_every_version_of_a_channel_survives_reopening(backend: Backend, state: State) -> None:
    """A committed channel is read back field by field by the next process, in every state that a channel can have."""
    versions = Payer(state.value).history(state)
    previous = None
    for version in versions:
        store = backend.open()
        assert list(await store.commit([Change(previous, version)])) == [True]
        await store.close()
        store = backend.open()
        assert await store.get(version.outpoint) == version
        assert [channel async for channel in walk(store, version.state)] == [version]
        await store.close()
        previous = version


async def test_unknown_outpoint_is_none(store: Store) -> None:
    """An outpoint that was never used has no channel."""
    await put(store, Payer("known").channel())

    assert await store.get(Payer("unknown").outpoint) is None


async def test_commits_begun_before_close_are_finished(backend: Backend) -> None:
    """`close` lets running commits finish; a caller that waited for one got a true answer."""
    store, channels = backend.open(), many(50)
    commits = [asyncio.ensure_future(store.commit([Change(None, channel)])) for channel in channels]
    await asyncio.sleep(0)
    await store.close()
    answers = await asyncio.gather(*commits)

    assert [list(answer) for answer in answers] == [[True]] * len(channels)
    store = backend.open()
    assert [await store.get(channel.outpoint) for channel in channels] == channels
    await store.close()


async def test_a_closed_store_answers_nothing(backend: Backend) -> None:
    """After `close` every method fails, also after a second `close`."""
    store, channel = backend.open(), Payer("closed").channel()
    await put(store, channel)
    await store.close()
    await store.close()

    with pytest.raises(StoreFailed):
        await store.get(channel.outpoint)
    with pytest.raises(StoreFailed):
        await store.commit([Change(channel, later(channel))])
    with pytest.raises(StoreFailed):
        await store.scan(State.OPEN)
    with pytest.raises(StoreFailed), store.snapshot():
        pass


# --- conditional ----------------------------------------------------------------------------------------------------


async def test_threat_4_an_outpoint_opens_once(store: Store) -> None:
    """A second channel with the same outpoint is not written (threat 4)."""
    channel = Payer("once").channel()
    other = Payer("once").channel(paid_sat=20_000)
    await put(store, channel)

    assert list(await store.commit([Change(None, other)])) == [False]
    assert await store.get(channel.outpoint) == channel


@pytest.mark.parametrize("state", State)
async def test_threat_4_an_outpoint_is_never_used_again(store: Store, state: State) -> None:
    """However a channel ended, its outpoint opens no other one (threat 4: resurrection)."""
    payer = Payer("ended")
    versions = payer.history(state)
    assert all(await store.commit([Change(old, new) for old, new in zip([None, *versions], versions, strict=False)]))

    assert list(await store.commit([Change(None, payer.channel())])) == [False]
    assert await store.get(payer.outpoint) == versions[-1]


async def test_threat_10_only_the_seen_version_is_replaced(store: Store) -> None:
    """A writer that missed a version changes nothing; the other records of its batch are written (threat 10)."""
    stale, good, absent = (Payer(name).channel() for name in ("stale", "good", "absent"))
    await put(store, stale, good)
    newest = later(stale)
    assert list(await store.commit([Change(stale, newest)])) == [True]

    batch = [Change(stale, later(stale)), Change(good, later(good)), Change(absent, later(absent))]
    assert list(await store.commit(batch)) == [False, True, False]
    assert await store.get(stale.outpoint) == newest
    assert await store.get(good.outpoint) == later(good)
    assert await store.get(absent.outpoint) is None


async def test_a_batch_sees_its_own_changes(store: Store) -> None:
    """Within a batch, a second creation and a second update of one version fail, and a chain of updates succeeds."""
    payer = Payer("chain")
    first = payer.channel()
    second = payer.pay(first)
    third = payer.pay(second)
    fork = payer.pay(first, paid_sat=7)

    batch = [
        Change(None, first),
        Change(None, first),
        Change(first, second),
        Change(first, fork),
        Change(second, third),
    ]
    assert list(await store.commit(batch)) == [True, False, True, False, True]
    assert await store.get(first.outpoint) == third
    assert [channel async for channel in walk(store, State.OPEN)] == [third]


async def test_a_channel_may_open_and_close_in_one_batch(store: Store) -> None:
    """Opened and closed in one batch, a channel is listed only in its last state."""
    versions = Payer("short").history(State.CLOSED)
    batch = [Change(old, new) for old, new in zip([None, *versions], versions, strict=False)]
    assert all(await store.commit(batch))

    listed = {state: [channel async for channel in walk(store, state)] for state in State}
    assert listed == {**{state: [] for state in State}, State.CLOSED: [versions[-1]]}


async def test_of_racing_writers_one_wins(store: Store) -> None:
    """Of concurrent commits that start from the same version, exactly one is written, and that one is read."""
    channel = Payer("race").channel()
    await put(store, channel)
    rivals = [replace(later(channel), opened_at=UnixTime(number)) for number in range(20)]

    answers = await asyncio.gather(*(store.commit([Change(channel, rival)]) for rival in rivals))
    won = [rival for rival, answer in zip(rivals, answers, strict=True) if answer[0]]
    assert [await store.get(channel.outpoint)] == won


async def test_the_same_number_is_not_the_same_version(store: Store) -> None:
    """A writer whose version lost the race can't build on it, although the stored one has the same number."""
    payer = Payer("numbers")
    first = payer.channel()
    stored, lost = payer.pay(first, paid_sat=5), payer.pay(first, paid_sat=9)
    await put(store, first)
    assert list(await store.commit([Change(first, stored)])) == [True]

    assert stored.seq == lost.seq
    assert list(await store.commit([Change(lost, payer.pay(lost))])) == [False]
    assert await store.get(first.outpoint) == stored


async def test_an_empty_commit_is_valid(store: Store) -> None:
    """No changes give no results."""
    assert list(await store.commit([])) == []


# --- listing --------------------------------------------------------------------------------------------------------

operations = st.lists(
    st.lists(
        st.tuples(
            st.integers(0, 11),  # which outpoint
            st.sampled_from(State),
            st.integers(0, 3),  # expiry of a new channel; few values, so that many are equal
            st.booleans(),  # whether the writer has read the newest version
        ),
        max_size=8,
    ),
    max_size=10,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(operations, st.integers(1, 5), st.integers(0, 4))
@pytest.mark.parametrize("engine", sorted(BACKENDS))
def test_the_store_is_a_dictionary_and_a_sorted_list(
    engine: str, batches: list[list[tuple[int, State, int, bool]]], limit: int, before: int
) -> None:
    """After any batches, the results, `get` and every page of `scan` equal those of a plain dictionary."""
    with tempfile.TemporaryDirectory() as directory:
        asyncio.run(_compare_with_model(BACKENDS[engine](Path(directory)), batches, limit, before))


async def _compare_with_model(
    backend: Backend, batches: list[list[tuple[int, State, int, bool]]], limit: int, before: int
) -> None:
    fresh, model = many(12), dict[bytes, Channel]()
    base = 1_600_000_000
    store = backend.open()
    for batch in batches:
        changes, want = [], []
        for number, state, expiry, current in batch:
            key = fresh[number].outpoint.serialize()
            previous = model.get(key)
            if previous is None:
                terms = replace(fresh[number].terms, expiry=Expiry(base + expiry))
                channel = replace(fresh[number], state=state, terms=terms)
            else:
                channel = replace(later(previous), state=state)
            seen = previous if current else replace(channel, seq=99)
            changes.append(Change(seen, channel))
            want.append(current)
            if current:
                model[key] = channel
        assert list(await store.commit(changes)) == want
    for channel in fresh:
        assert await store.get(channel.outpoint) == model.get(channel.outpoint.serialize())
    for state in State:
        await _compare_pages(store, model, state, limit, base + before)
    await store.close()


async def _compare_pages(store: Store, model: dict[bytes, Channel], state: State, limit: int, before: int) -> None:
    def order(channel: Channel) -> tuple[int, bytes]:
        return channel.terms.expiry.lock_time, channel.outpoint.serialize()

    chosen = (
        channel for channel in model.values() if channel.state is state and channel.terms.expiry.lock_time < before
    )
    want = sorted(chosen, key=order)
    got: list[Channel] = []
    after = None
    while page := await store.scan(state, before=before, after=after, limit=limit):
        assert len(page) <= limit
        got += page
        after = (page[-1].terms.expiry.lock_time, page[-1].outpoint)
    assert got == want


async def test_expiries_at_both_ends_are_listed(store: Store) -> None:
    """The first and the last possible expiry are listed, and `before` excludes its own second."""
    first, last = Payer("first", expiry=UnixTime(500_000_000)), Payer("last", expiry=UnixTime(0xFFFFFFFF))
    channels = [replace(Payer("any").channel(), terms=payer.terms, outpoint=payer.outpoint) for payer in (first, last)]
    await put(store, *channels)

    assert list(await store.scan(State.OPEN)) == channels
    assert list(await store.scan(State.OPEN, before=0xFFFFFFFF)) == channels[:1]
    assert list(await store.scan(State.OPEN, before=500_000_000)) == []


async def test_a_long_scan_delays_no_commit(store: Store) -> None:
    """During a long listing, commits are still answered."""
    channels = many(5_000)
    await put(store, *channels)
    listing = asyncio.ensure_future(store.scan(State.OPEN, limit=len(channels)))
    await asyncio.sleep(0)  # lets the listing begin
    channel = channels[0]
    answered = 0
    while not listing.done():
        assert list(await store.commit([Change(channel, later(channel))])) == [True]
        channel = later(channel)
        answered += 1

    assert answered >= 2
    assert {found.outpoint for found in await listing} == {channel.outpoint for channel in channels}


# --- snapshots ------------------------------------------------------------------------------------------------------


async def test_a_snapshot_is_one_moment(store: Store) -> None:
    """Channels that change together are never seen at different versions, and no later commit is seen."""
    channels = many(300)
    await put(store, *channels)
    writing = True

    async def write() -> int:
        newest = channels
        while writing:
            newest_again = [later(channel) for channel in newest]
            assert all(await store.commit([Change(*pair) for pair in zip(newest, newest_again, strict=True)]))
            newest = newest_again
        return newest[0].seq

    def read() -> set[int]:
        with store.snapshot() as records:
            seen = Counter(decode_record(raw).seq for raw in records)
        assert sum(seen.values()) == len(channels)
        return set(seen)

    writer = asyncio.ensure_future(write())
    moments: list[set[int]] = []
    while len(moments) < 20 or moments[-1] == moments[0]:  # the writer may be slow on a busy machine
        moments.append(await asyncio.to_thread(read))
    writing = False

    assert all(len(moment) == 1 for moment in moments)
    assert max(seq for moment in moments for seq in moment) <= await writer


async def test_a_snapshot_shows_the_state_at_its_start(store: Store) -> None:
    """A commit between the start of the snapshot and its reading is not in it."""
    old, new = Payer("old").channel(), Payer("new").channel()
    await put(store, old)
    loop = asyncio.get_running_loop()

    def read() -> list[Channel]:
        with store.snapshot() as records:
            asyncio.run_coroutine_threadsafe(put(store, new), loop).result()
            return [decode_record(raw) for raw in records]

    assert await asyncio.to_thread(read) == [old]


async def test_a_snapshot_yields_the_stored_bytes(store: Store) -> None:
    """Records are yielded byte for byte, each once, including damaged ones: a backup must detect them."""
    channels = many(2_500)
    await put(store, *channels)

    def read() -> list[bytes]:
        with store.snapshot() as records:
            return list(records)

    assert Counter(await asyncio.to_thread(read)) == Counter(encode_record(channel) for channel in channels)


async def test_close_ends_a_running_snapshot(store: Store) -> None:
    """If the store closes under a snapshot, its reader gets an error, not a truncated list."""
    await put(store, *many(100))
    begun = threading.Event()

    def read() -> int:
        with store.snapshot() as records:
            next(records)
            begun.set()
            with suppress(StoreFailed):
                while True:  # until the closing store refuses a new reader
                    with store.snapshot():
                        pass
            return 1 + sum(1 for _ in records)

    reader = asyncio.ensure_future(asyncio.to_thread(read))
    await asyncio.to_thread(begun.wait)
    await store.close()

    with pytest.raises(StoreFailed):
        await reader


# --- damage ---------------------------------------------------------------------------------------------------------


async def test_threat_12_any_flipped_byte_is_damage_and_stays(backend: Backend) -> None:
    """A record with one byte changed, at any position, is not returned, not listed and not overwritten (threat 12)."""
    size = len(encode_record(many(1)[0]))
    channels, bits = many(size), random.Random(1)
    store = backend.open()
    await put(store, *channels)
    await store.close()
    damaged = {}
    for position, channel in enumerate(channels):
        raw = bytearray(encode_record(channel))
        raw[position] ^= 1 << bits.randrange(8)
        damaged[channel.outpoint] = bytes(raw)
    for outpoint, raw in damaged.items():
        backend.put_raw(outpoint, raw)

    store = backend.open()
    for channel in channels:
        with pytest.raises(DamagedRecord):
            await store.get(channel.outpoint)
    assert not any(await store.commit([Change(channel, later(channel)) for channel in channels]))
    assert not any(await store.commit([Change(None, channel) for channel in channels]))
    await store.close()
    assert all(backend.raw(outpoint) == raw for outpoint, raw in damaged.items())


@pytest.mark.parametrize("damage", [b"", b"\x01", b"\x00" * 300])
async def test_something_else_in_place_of_a_record_is_damage(backend: Backend, damage: bytes) -> None:
    """No bytes, few bytes and zeros are damage."""
    channel = Payer("zeros").channel()
    store = backend.open()
    await put(store, channel)
    await store.close()
    backend.put_raw(channel.outpoint, damage)

    store = backend.open()
    with pytest.raises(DamagedRecord):
        await store.get(channel.outpoint)
    await store.close()


async def test_damage_hides_no_other_channel(backend: Backend) -> None:
    """A scan leaves a damaged record out, names it in the log, and fills its page with other records."""
    channels = sorted(many(10), key=lambda channel: (channel.terms.expiry.lock_time, channel.outpoint.serialize()))
    store = backend.open()
    await put(store, *channels)
    await store.close()
    backend.put_raw(channels[3].outpoint, b"rotten")

    store = backend.open()
    with structlog.testing.capture_logs() as quiet:
        assert list(await store.scan(State.OPEN, limit=3)) == channels[:3]
    with structlog.testing.capture_logs() as loud:
        assert list(await store.scan(State.OPEN, limit=5)) == [*channels[:3], *channels[4:6]]
    await store.close()
    assert quiet == [], "records outside the page were read"
    assert [(entry["log_level"], entry["channel"]) for entry in loud] == [("error", str(channels[3].outpoint))]


async def test_due_channels_are_found_without_reading_the_rest(backend: Backend) -> None:
    """Listing by expiry reads no record that expires later: all of these are damaged, and no error is logged."""
    channels = sorted(many(60), key=lambda channel: (channel.terms.expiry.lock_time, channel.outpoint.serialize()))
    due, rest = channels[:4], channels[4:]
    store = backend.open()
    await put(store, *channels)
    await store.close()
    for channel in rest:
        backend.put_raw(channel.outpoint, b"rotten")

    store = backend.open()
    with structlog.testing.capture_logs() as quiet:
        assert list(await store.scan(State.OPEN, before=rest[0].terms.expiry.lock_time)) == due
        assert [channel async for channel in walk(store, State.OPEN, rest[0].terms.expiry.lock_time)] == due
    await store.close()
    assert quiet == []


# --- messages -------------------------------------------------------------------------------------------------------


async def test_fault_48_messages_are_written_with_their_change(backend: Backend) -> None:
    """They wait in the order of a channel's changes, also in the next process, until each is removed."""
    store = backend.open()
    store.announce_by(  # type: ignore[attr-defined]
        lambda before, after: [f"{after.state.value} {after.seq}".encode()] * (2 if before is None else 1)
    )
    channels = sorted(many(3), key=lambda channel: channel.outpoint.serialize())
    await put(store, *channels)
    closing = [replace(channel, seq=300, state=State.CLOSING) for channel in channels]
    assert all(await store.commit([Change(a, b) for a, b in zip(channels, closing, strict=True)]))
    same = [replace(channel, seq=301) for channel in closing]
    assert all(await store.commit([Change(a, b) for a, b in zip(closing, same, strict=True)]))
    assert list(await store.commit([Change(channels[0], same[0])])) == [False]
    await store.close()
    store = backend.open()
    bodies = [f"open {channels[0].seq}".encode()] * 2 + [b"closing 300"]
    waiting = list(await store.messages())
    assert [(message.outpoint, message.body) for message in waiting] == [
        (channel.outpoint, body) for channel in channels for body in bodies
    ]
    assert list(await store.messages(waiting[3].key, 2)) == waiting[4:6]
    await store.delivered(waiting[4].key)
    await store.delivered(waiting[4].key)
    assert list(await store.messages()) == waiting[:4] + waiting[5:]
    assert [channel async for channel in walk(store, State.CLOSING)] == sorted(
        same, key=lambda channel: (channel.terms.expiry.lock_time, channel.outpoint.serialize())
    )
    await store.close()
