"""The server's log: events as key=value lines on standard error, through a sink that never blocks."""

from __future__ import annotations

import atexit
import logging
import sys
from typing import TextIO, cast

import structlog
from structlog.typing import Processor

from paychan.config import ServerConfig
from paychan.memory import end_when_logged
from paychan.shared.logsink import LogSink, open_missing_descriptors
from paychan.tracing import add_ids


def configure_log(config: ServerConfig) -> None:
    """Send all output of this process through the sink, including tracebacks and messages of libraries."""
    open_missing_descriptors()
    sink = LogSink(2)
    sys.stderr = sink
    atexit.register(sink.drain)
    level: int = getattr(logging, config.log.level.upper())
    facts: list[Processor] = [
        add_ids,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        end_when_logged,
        structlog.processors.format_exc_info,
    ]
    line = structlog.processors.LogfmtRenderer(key_order=("timestamp", "level", "event"), drop_missing=True)
    handler = logging.StreamHandler(sink)  # for asyncio, tornado and the modules that the payer's client shares
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
    """Return the number of log lines that this process lost, and whether its newest lines are still unwritten."""
    sink = sys.stderr
    return (sink.lost, sink.failing) if isinstance(sink, LogSink) else (0, False)


def drain_log() -> None:
    """Write the waiting lines, if the reader takes them: for an exit that runs no `atexit` handler."""
    if isinstance(sys.stderr, LogSink):
        sys.stderr.drain()
