"""The server's log: events as key=value lines on standard error, through a sink that loses lines rather than time."""

from __future__ import annotations

import atexit
import logging
import sys
from typing import TextIO, cast

import structlog
from structlog.typing import Processor

from paychan.config import ServerConfig
from paychan.logsink import LogSink, open_missing_descriptors
from paychan.memory import end_when_logged


def configure_log(config: ServerConfig) -> None:
    """Let everything that this process says go through the sink, also tracebacks and what libraries write."""
    open_missing_descriptors()
    sink = LogSink(2)
    sys.stderr = sink
    atexit.register(sink.drain)
    level: int = getattr(logging, config.log.level.upper())
    facts: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        end_when_logged,
        structlog.processors.format_exc_info,
    ]
    line = structlog.processors.LogfmtRenderer(key_order=("timestamp", "level", "event"), drop_missing=True)
    handler = logging.StreamHandler(sink)  # for asyncio, tornado, and what payers use too
    strip = structlog.stdlib.ProcessorFormatter.remove_processors_meta
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(processors=[strip, line], foreign_pre_chain=facts))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("chain").setLevel(level)
    structlog.configure(
        processors=[*facts, line],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(file=cast("TextIO", sink)),
        cache_logger_on_first_use=True,
    )


def lost_lines() -> tuple[int, bool]:
    """Return how many lines of this process's log were lost, and whether the newest could not be written yet."""
    sink = sys.stderr
    return (sink.lost, sink.failing) if isinstance(sink, LogSink) else (0, False)


def drain_log() -> None:
    """Write what waits, if its reader takes it: before an end that runs no `atexit`."""
    if isinstance(sys.stderr, LogSink):
        sys.stderr.drain()
