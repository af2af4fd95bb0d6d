"""The composition root: the one module that knows every backend.

It starts the parts and stops them in reverse order.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
from collections.abc import AsyncIterator, Callable
from functools import partial

import structlog
import uvloop

from actors.alarm import Kind
from actors.context import Context, wall_clock
from actors.event_log import EventLog
from actors.exposure import Exposure
from actors.group_commit import GroupCommit
from actors.observing import Observers
from actors.roles import Serving, Settling
from paychan import termsfile
from paychan.api.budgets.descriptors import Descriptors, TooFewDescriptors, divide, raise_limit
from paychan.api.no_store import waiting_room
from paychan.api.service import Service
from paychan.callback.outbox import Outbox
from paychan.config import ServerConfig
from paychan.config_checks import doubts
from paychan.diskreserve import DiskReserve
from paychan.listeners import listening
from paychan.logs import configure_log, drain_log
from paychan.memory import SERVE_BYTES, START_BYTES, Memory, TooLittleMemory, end_when_memory_ends, prepare_for_limit
from paychan.parts import StartError, make_application, make_chain, make_signer, make_state_dir, restored_messages
from paychan.protocol.errors import PaychanError, StorageFull, StoreRebuilding
from paychan.protocol.types import Sat
from paychan.shared.stuck import end_when_stuck
from paychan.store.backup.archive import BackupError
from paychan.store.backup.rebuild import finish_rebuild, rebuild
from paychan.store.base import StoreDamaged, StoreFailed
from paychan.store.leveldb.directory import WHAT_TO_DO, WRITE_BUFFER_BYTES, noted_damage
from paychan.store.leveldb.store import LevelDbStore
from paychan.supervisor import Supervised, Supervisor
from paychan.work import Work

log = structlog.get_logger("server")

_EXIT_BROKEN = 3

_STORE_BYTES = 1_000_000
"""With more free bytes than this, a store that can't be opened has another problem than a full disk."""
_DISK_SECONDS = 1.0
_DAMAGE_SECONDS = 1.0
_LIMITED_SECONDS, _UNLIMITED_SECONDS = 0.05, 1.0
"""Pauses between two measurements of memory, with a limit and without one: a limit can be set while the server runs."""


def run(config: ServerConfig, source: str) -> None:
    """Serve until SIGINT or SIGTERM.

    Raises:
        StartError, SettingsError: raised before the server listens.
    """
    configure_log(config)
    if config.state_place.note:
        log.warning("state in an old place", note=config.state_place.note)
    prepare_for_limit()
    uvloop.run(_serve(config, source))


async def _serve(config: ServerConfig, source: str) -> None:
    """Serve until a signal cancels this task, during start-up as well as later."""
    for key, reason in doubts(config):
        log.warning("doubtful setting", key=key, reason=reason)
    serving = asyncio.create_task(_live_again(config, source))
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, _stop, serving)
    for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):  # sent by log rotation or a lost terminal
        asyncio.get_running_loop().add_signal_handler(number, _go_on, number)
    with contextlib.suppress(asyncio.CancelledError):
        await serving


def _stop(serving: asyncio.Task[None]) -> None:
    """Start the shutdown; a second signal does not interrupt it."""
    if not serving.cancelling():
        log.info("stopping")
        serving.cancel()


def _go_on(number: signal.Signals) -> None:
    log.info("signal ignored", signal=number.name)


async def _live_again(config: ServerConfig, source: str) -> None:
    """Start again in this process when damage was found: the start rebuilds the store."""
    again = True
    while again:
        again = await _live(config, source)
        if again:
            log.error("the store is damaged, the server starts again to rebuild it")


async def _live(config: ServerConfig, source: str) -> bool:
    """Serve requests at once, as far as the available parts allow. A missing part joins when it becomes available.

    Return true when the store is found to be damaged. A store that was damaged before this start and could not be
    rebuilt is served as it is.
    """
    async with _assemble(config, source) as service, _working(service) as work:
        store = service.context.store
        was_damaged = bool(store.damage.text)
        await work.first_look()
        _check_memory(service.memory, SERVE_BYTES)
        async with listening(service, source) as running:
            gc.collect()
            # a payment leaves no cycles
            gc.set_threshold(5_000, 20, 20)
            gc.freeze()  # the collector skips objects that live as long as the process
            log.info(
                "serving",
                network=config.network_name,
                url=running.url,
                management=running.management_url,
                **({"gateway": running.gateway_url} if running.gateway_url else {}),
                state=str(config.state_dir),
            )
            try:
                return await _wait(work.wrong, lambda: bool(store.damage.text) and not was_damaged)
            finally:
                await work.stop()


async def _wait(wrong: asyncio.Future[None], is_damaged: Callable[[], bool]) -> bool:
    """Wait until damage is found, and return true. Raises `StartError` when `wrong` does."""
    while not is_damaged():
        await asyncio.wait([wrong], timeout=_DAMAGE_SECONDS)
        if wrong.done():
            wrong.result()
    return True


@contextlib.asynccontextmanager
async def _working(service: Service) -> AsyncIterator[Work]:
    work = Work(service)
    try:
        yield work
    finally:
        await work.stop()


@contextlib.asynccontextmanager
async def _assemble(config: ServerConfig, source: str) -> AsyncIterator[Service]:
    """Create the parts in the order of their dependencies; close them in reverse order."""
    make_state_dir(config.state_dir, config.store_path)
    descriptors = _descriptors(config)
    async with contextlib.AsyncExitStack() as stack:
        memory = Memory()
        stack.callback(memory.close)
        _check_memory(memory, START_BYTES)
        end_when_memory_ends(asyncio.get_running_loop())
        end_when_stuck(asyncio.get_running_loop())
        await asyncio.to_thread(int)  # starts the pool's thread now: starting one may fail when memory is short
        supervisor = Supervisor(wall_clock, _die)
        stack.push_async_callback(supervisor.close)
        signer = make_signer(config, source)
        stack.push_async_callback(signer.close)
        chain = make_chain(config, source, supervisor)
        stack.push_async_callback(chain.close)
        reserve = DiskReserve(config.store_path, config.store.reserve_mb * 1_000_000, WRITE_BUFFER_BYTES)
        store = await _open_store(config, reserve)
        stack.push_async_callback(store.close)
        application, outbox = make_application(config, store)
        if application is not None:
            stack.push_async_callback(application.close)
        observers = Observers(EventLog(everything=config.log.level == "debug"), *([outbox] if outbox else []))
        commits = GroupCommit(store, config.store.commit_delay_ms / 1000, _die, config.store.max_waiting, observers)
        supervisor.guest("group commit", lambda: commits.last_success)
        stack.push_async_callback(commits.close)
        context = Context(
            network=config.bitcoin_network,
            rules=config.rules,
            settlement_confirmations=config.settlement.confirmations,
            clock=wall_clock,
            store=store,
            commits=commits,
            chain=chain,
            signer=signer,
            application=application,
            terms=termsfile.present(
                config.state_dir, config.opening_terms, config.open.terms_hold_hours * 3600, wall_clock()
            ),
            storage_problem=lambda: None if reserve.allows_channels else StorageFull(),
            memory_problem=memory.new_work,
            exposure=Exposure(Sat(config.open.unconfirmed_limit_sat)),
            batch_seconds=config.settlement.batch_seconds,
            batch_channels=config.settlement.batch_channels,
            withdraw_above_sat=config.settlement.withdraw_above_sat,
            coalesce=config.stream.coalesce,
            observers=observers,
        )
        _watch_room(commits, memory, reserve, supervisor)
        supervisor.run("disk reserve", reserve.run)
        yield _service(config, context, supervisor, descriptors, memory, outbox)


def _watch_room(commits: GroupCommit, memory: Memory, reserve: DiskReserve, supervisor: Supervisor) -> None:
    """Keep `commits.problem` up to date, so that a payment need not measure disk and memory."""
    loop = asyncio.get_running_loop()

    def update() -> None:
        commits.problem = memory.any_work() if reserve.allows_payments else StorageFull()

    async def watch_memory(task: Supervised) -> None:
        while True:
            update()
            task.succeeded()
            await asyncio.sleep(_LIMITED_SECONDS if memory.is_limited else _UNLIMITED_SECONDS)

    reserve.on_change = partial(loop.call_soon_threadsafe, update)
    update()
    supervisor.run("memory", watch_memory)


def _check_memory(memory: Memory, need_bytes: int) -> None:
    try:
        memory.check(need_bytes)
    except TooLittleMemory as error:
        raise StartError(str(error)) from None


def _descriptors(config: ServerConfig) -> Descriptors:
    """Raise the limit of open files and divide it. This comes before the store opens: LevelDB reads the limit once."""
    try:
        found = divide(raise_limit(), config)
    except TooFewDescriptors as error:
        raise StartError(str(error)) from None
    log.info("files", limit=found.limit, clients=found.clients, management=found.management)
    return found


async def _open_store(config: ServerConfig, reserve: DiskReserve) -> LevelDbStore:
    """Open the store, after rebuilding it if it is damaged, and with space from the reserve if the disk is full.

    While the disk is too full even for that, answer requests with `StorageFull` and try again.
    """
    reserve.look()
    finish_rebuild(config.store_path)
    noted = noted_damage(config.store_path)
    if noted:
        await _rebuild(config, noted)
    while True:
        has_room = reserve.file.make_room(reserve.file.opening_bytes())
        try:
            store = LevelDbStore.open(config.store_path, config.network_name)
        except StoreDamaged as error:
            if noted or not await _rebuild(config, str(error)):
                raise
            noted = str(error)
            continue
        except StoreFailed as error:
            if has_room and reserve.file.free() >= _STORE_BYTES:
                raise
            log.error("no room on disk to open the store, waiting for free space", reason=str(error))  # noqa: TRY400
        else:
            store.guard_disk(reserve.file.size, reserve.file.before_write)
            reserve.begin_log = store.begin_log
            reserve.opened()
            return store
        async with _no_store(config, StorageFull(), Kind.DISK):
            await asyncio.sleep(_DISK_SECONDS)
            while not reserve.file.make_room(reserve.file.opening_bytes()):  # noqa: ASYNC110 - a disk sends no event
                await asyncio.sleep(_DISK_SECONDS)


async def _rebuild(config: ServerConfig, reason: str) -> bool:
    """Rebuild the damaged store; say whether that worked. A store that stays as it is may still open."""
    log.error("the store is damaged, rebuilding it from all records that can be read", reason=reason)
    async with _no_store(config, StoreRebuilding(), Kind.STORE):
        try:
            work = partial(rebuild, config.store_path, config.backup_dir, config.network_name, wall_clock())
            summary = await asyncio.to_thread(work, announce=restored_messages(config))
        except (BackupError, OSError) as error:
            log.critical("the damaged store can't be rebuilt", reason=str(error), what_to_do=WHAT_TO_DO)
            return False
    log.error("the store was rebuilt", summary=summary)
    return True


@contextlib.asynccontextmanager
async def _no_store(config: ServerConfig, error: PaychanError, kind: Kind) -> AsyncIterator[None]:
    """Answer requests with this error while there is no store."""
    async with contextlib.AsyncExitStack() as stack:
        try:
            await stack.enter_async_context(waiting_room(config, error, kind))
        except OSError as problem:
            raise StartError(problem.strerror) from problem
        yield


def _service(
    config: ServerConfig,
    context: Context,
    supervisor: Supervisor,
    descriptors: Descriptors,
    memory: Memory,
    outbox: Outbox | None,
) -> Service:
    serving = Serving(context)
    settling = Settling(
        context,
        serving.registry,
        interval_seconds=config.watcher.interval_seconds,
        alarm_seconds=config.watcher.alarm_hours * 3600,
        idle_seconds=config.channel.idle_seconds,
        stale_seconds=config.chain.stale_tip_minutes * 60,
        show_seconds=config.signer.show_seconds,
    )
    return Service(config, context, serving.registry, serving.opener, settling, descriptors, outbox, supervisor, memory)


def _die(error: BaseException) -> None:
    """End the process after a disk failure: the stored state is the truth, so this process must not answer again."""
    log.critical("store failed, stopping at once", reason=str(error))
    drain_log()
    os._exit(_EXIT_BROKEN)
